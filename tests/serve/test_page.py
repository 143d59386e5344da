"""The page of `lowtide serve` in a browser, as its users have it: Debian's chromium, without a window."""

from __future__ import annotations

import os
import re
import shutil
import time
from importlib import resources

import pytest
from tests.serve.server import Server

pytest.importorskip("fastapi")
playwright = pytest.importorskip("playwright.sync_api")
expect = playwright.expect
expect.set_options(timeout=180_000)

INSTALL = "apt-get install -y --no-install-recommends chromium"
DESKTOP = {"width": 1280, "height": 900}
PHONE = {"width": 390, "height": 844}
ASKED = {"prompt": "a boat", "width": 64, "height": 64, "num_inference_steps": 2}
LONG = {**ASKED, "prompt": "a long one", "num_inference_steps": 500}
EXPECTED = "Failed to load resource"
"""What Chromium writes to the console of answers that are errors, which the page itself deals with."""


@pytest.fixture(scope="module")
def browser():
    path = shutil.which("chromium") or shutil.which("chromium-browser")
    if path is None and (os.environ.get("CI") or os.geteuid() == 0):
        pytest.fail(f"There is no chromium: {INSTALL}")
    if path is None:
        pytest.skip(f"There is no chromium: sudo {INSTALL}")
    with playwright.sync_playwright() as driver:
        sandbox = ["--no-sandbox"] if os.geteuid() == 0 else []
        browser = driver.chromium.launch(executable_path=path, args=sandbox)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def server(tmp_path_factory, browser):
    server = Server(tmp_path_factory.mktemp("page"), "--ram", "700MB")
    server.begun = time.monotonic()
    yield server
    server.kill()


@pytest.fixture(scope="module")
def made(server):
    """A job that is done."""
    server.wait_until_ready()
    return server.ended(server.ask("POST", "/jobs", {**ASKED, "prompt": "made before"})[1]["id"])


@pytest.fixture
def visit(browser, server):
    """Opens the page; in the end no request has left the server's origin, and no script has complained."""
    asked, wrong, contexts = [], [], []

    def visit(viewport=DESKTOP, **options):
        contexts.append(browser.new_context(viewport=viewport, reduced_motion="reduce", **options))
        page = contexts[-1].new_page()
        page.set_default_timeout(180_000)
        page.on("request", lambda request: asked.append(request.url))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("console", lambda said: said.type == "error" and wrong.append(said.text))
        while "http://" not in server.said:
            time.sleep(0.05)
        page.goto(server.address)
        return page

    yield visit
    for context in contexts:
        context.close()
    assert asked
    own = (f"{server.address}/", f"blob:{server.address}/", "data:")
    assert [url for url in asked if not url.startswith(own)] == []
    assert [said for said in wrong if EXPECTED not in said] == []


@pytest.fixture
def page(visit):
    page = visit()
    expect(page.locator("#plan")).to_contain_text("Takes")
    return page


def write(page, **asked):
    for name, value in {**ASKED, **asked}.items():
        page.locator(f"[name={name}]").fill(str(value))


def card(page, prompt, state):
    return page.locator(f"[data-state={state}]", has_text=prompt).first


def picture(page, prompt):
    """The picture of a job that is done, once it is seen."""
    shown = card(page, prompt, "done").locator("img[src^=blob]").first
    shown.scroll_into_view_if_needed()
    assert shown.evaluate("async (image) => { await image.decode(); return image.naturalWidth }") == 64
    return shown


def test_the_first_picture_is_there_soon_after_the_server_is_started(visit, server):
    page = visit()
    write(page, prompt="the first")
    page.keyboard.press("Control+Enter")
    picture(page, "the first")
    seconds = time.monotonic() - server.begun
    print(f"the first picture {seconds:.1f} s after the start")


def test_what_a_run_takes_is_told_before_it_is_asked_for(page, server):
    before = len(server.ask("GET", "/jobs")[1]["jobs"])
    write(page)
    page.get_by_label("Width").fill("")
    page.get_by_role("button", name="64 × 64").click()
    expect(page.get_by_role("button", name="64 × 64")).to_have_attribute("aria-pressed", "true")
    plan = server.ask("POST", "/plan", ASKED)[1]
    budget = server.ask("GET", "/capabilities")[1]["budget"]["ram"]
    expect(page.locator("#plan")).to_contain_text(
        f"Takes {plan['peak'] / 1e9:.2f} GB of {budget / 1e9:.2f} GB and about"
    )
    assert len(server.ask("GET", "/jobs")[1]["jobs"]) == before


def test_what_does_not_fit_cannot_be_asked_for_and_what_does_is_offered(page):
    write(page, width=1024, height=1024)
    make = page.get_by_role("button", name="Make")
    expect(page.locator("#plan")).to_contain_text("Does not fit: it needs at least")
    expect(make).to_be_disabled()
    page.get_by_role("button", name="which fits").click()
    expect(page.locator("#plan")).to_contain_text("Takes")
    expect(make).to_be_enabled()
    write(page, width=100)
    expect(page.locator("#plan")).to_contain_text("100")
    expect(make).to_be_disabled()


def test_while_it_runs_there_are_steps_previews_and_memory_and_it_can_be_cancelled(page):
    write(page, **LONG)
    page.get_by_role("button", name="Make").click()
    running = card(page, LONG["prompt"], "running")
    expect(running).to_be_visible()
    write(page, prompt="one that waits")
    page.get_by_role("button", name="Make").click()
    waiting = card(page, "one that waits", "queued")
    expect(waiting.locator(".state")).to_contain_text("1 job before it")
    expect(running.locator(".state")).to_contain_text(" of 500 · ")
    expect(running.locator(".state")).to_contain_text("left")
    expect(running.locator(".memory figcaption")).to_contain_text("GB of 0.70 GB in use")
    expect(running.locator(".preview")).to_be_visible()
    assert len(running.locator(".line").get_attribute("points").split()) > 1
    for job, prompt in ((waiting, "one that waits"), (running, LONG["prompt"])):
        job.get_by_role("button", name="Cancel").click()
        expect(card(page, prompt, "cancelled").locator(".state")).to_have_text("Cancelled")
        assert card(page, prompt, "cancelled").get_by_role("button", name="Delete").is_visible()


def test_settings_are_taken_again_and_varied(page):
    sampler = page.get_by_label("Sampler")
    sampler.select_option(index=1)
    chosen = sampler.input_value()
    write(page, prompt="with a seed", seed=11)
    page.get_by_role("button", name="Make").click()
    picture(page, "with a seed")
    done = card(page, "with a seed", "done")
    expect(done.locator(".settings")).to_contain_text(f"64 × 64 · 2 steps · {chosen} · seed 11")
    page.reload()
    done.get_by_role("button", name="Again").click()
    values = [page.locator(f"[name={name}]").input_value() for name in ("prompt", "width", "seed", "sampler")]
    assert values == ["with a seed", "64", "11", chosen]
    done.get_by_role("button", name="Vary").click()
    expect(page.locator("[data-state=done]", has_text="with a seed")).to_have_count(2)
    settings = page.locator("[data-state=done]", has_text="with a seed").locator(".settings").all_inner_texts()
    assert len(set(settings)) == 2


def test_the_gallery_stays_and_what_is_deleted_goes(page, server):
    job = server.ask("POST", "/jobs", {**ASKED, "prompt": "from elsewhere"})[1]["id"]
    picture(page, "from elsewhere")
    page.reload()
    picture(page, "from elsewhere")
    with page.expect_download() as download:
        card(page, "from elsewhere", "done").get_by_role("link", name="Download").click()
    assert download.value.suggested_filename.startswith("from-elsewhere-")
    content = server.ask("GET", f"/jobs/{job}/content/0")[1]
    with open(download.value.path(), "rb") as file:
        assert file.read() == content
    delete = card(page, "from elsewhere", "done").get_by_role("button", name="Delete")
    delete.click()
    expect(page.get_by_role("button", name="Really delete?")).to_be_focused()
    page.get_by_role("button", name="Really delete?").click()
    expect(page.locator(".job", has_text="from elsewhere")).to_have_count(0)
    assert server.ask("GET", f"/jobs/{job}")[0] == 404


def test_the_keyboard_is_enough(page):
    page.keyboard.press("Tab")
    expect(page.get_by_label("Prompt", exact=True)).to_be_focused()
    page.keyboard.type("by keys")
    for name in ("64 × 64", "Steps"):
        tab_to(page, name)
        page.keyboard.press("Space") if name != "Steps" else page.keyboard.type("2")
    page.keyboard.press("Control+Enter")
    picture(page, "by keys")
    tab_to(page, "by keys, seed")
    page.keyboard.press("Enter")
    dialog = page.get_by_role("dialog")
    expect(dialog).to_be_visible()
    before = dialog.locator("img").get_attribute("alt")
    page.keyboard.press("ArrowRight")
    assert dialog.locator("img").get_attribute("alt") != before
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("Escape")
    expect(dialog).to_be_hidden()
    assert focused(page).startswith("by keys, seed")


def focused(page):
    return page.evaluate("() => document.activeElement.querySelector('img')?.alt ?? document.activeElement.labels?.[0]"
                         "?.innerText ?? document.activeElement.innerText")  # fmt: skip


def tab_to(page, name):
    for _ in range(60):
        page.keyboard.press("Tab")
        if focused(page).strip().startswith(name):
            return
    pytest.fail(f"No tab leads to {name!r}")


@pytest.mark.parametrize("width", [320, 390])
def test_a_phone_scrolls_in_one_direction(visit, made, width):
    page = visit({**PHONE, "width": width}, has_touch=True)
    write(page, prompt="averyveryverylongword" * 9, width=1024, height=1024)
    expect(page.locator("#plan")).to_contain_text("Does not fit")
    expect(page.locator(".job").first).to_be_visible()
    assert page.evaluate("() => document.documentElement.scrollWidth") <= width
    small = "(all) => all.filter((one) => one.checkVisibility() && one.offsetHeight < 44).map((one) => one.outerHTML)"
    assert page.locator("button, input, select").evaluate_all(small) == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_keeps_anyone_out(visit, server, made, scheme):
    job = server.ask("POST", "/jobs", LONG)[1]["id"]
    page = visit(color_scheme=scheme)
    expect(card(page, LONG["prompt"], "running").locator(".state")).to_contain_text("of 500")
    write(page, width=1024, height=1024)
    expect(page.get_by_role("button", name="which fits")).to_be_visible()
    violations = found_by_axe(page)
    server.ask("POST", f"/jobs/{job}/cancel")
    page.locator("[data-state=done] img").first.click()
    violations += page.evaluate("() => axe.run().then(({ violations }) => violations)")
    serious = [each for each in violations if each["impact"] in ("serious", "critical")]
    assert [(each["id"], [node["html"] for node in each["nodes"]]) for each in serious] == []
    ground = page.evaluate("() => getComputedStyle(document.body).backgroundColor")
    assert (max(map(int, ground[4:-1].split(","))) < 128) == (scheme == "dark")


def found_by_axe(page):
    page.evaluate((resources.files("axe_playwright_python") / "axe.min.js").read_text())
    return page.evaluate("() => axe.run().then(({ violations }) => violations)")


def test_a_key_is_asked_for_and_forgotten_with_the_tab(page, made):
    refusal = {"status": 401, "detail": "A key is asked for here: send it as 'Authorization: Bearer KEY'."}

    def guard(route):
        if route.request.headers.get("authorization") == "Bearer open sesame, please":
            route.fallback()
        else:
            route.fulfill(status=401, json=refusal)

    for path in ("jobs**", "plan", "capabilities"):
        page.route(f"**/{path}", guard)
    page.reload()
    expect(page.locator("#server")).to_have_text("A key is asked for here.")
    key = page.get_by_role("textbox", name="Key")
    key.fill("something else")
    key.press("Enter")
    expect(page.locator("#server")).to_have_text("This key is not known here.")
    key.fill("open sesame, please")
    key.press("Enter")
    expect(page.locator("#server")).to_contain_text("seascapes")
    expect(page.locator(".job").first).to_be_visible()
    expect(key).to_be_hidden()
    assert page.evaluate("() => [localStorage.length, document.cookie, sessionStorage.length]") == [0, "", 1]


def test_a_picture_to_start_from_is_sent_where_the_model_takes_one(page, server, made):
    expect(page.get_by_label("Picture to start from")).to_be_hidden()
    capabilities = server.ask("GET", "/capabilities")[1]
    capabilities["models"][0]["arguments"] += ["image", "strength"]
    sent, planned = [], []
    page.route("**/capabilities", lambda route: route.fulfill(json=capabilities))
    job = server.ask("GET", f"/jobs/{made['id']}")[1]
    call = {**job["call"], "prompt": "an edit"}
    edited = {**job, "id": "e", "call": call, "given": {"image": ["/jobs/e/given/image/0"]}}

    def take(route):
        if route.request.method == "POST":
            sent.append(route.request)
            route.fulfill(status=202, json=edited)
        else:
            route.fulfill(json={"jobs": [edited] if sent else []})

    def plan(route):
        planned.append(route.request)
        route.fulfill(json={"fits": True, "peak": 10**8, "seconds": 3, "exactness": "equal bits"})

    page.route(re.compile(r"/jobs(\?.*)?$"), take)
    page.route("**/plan", plan)
    page.route("**/jobs/e/*/**", lambda route: route.fulfill(body=b"it came with it", content_type="image/png"))
    page.reload()
    expect(page.locator("#plan")).to_contain_text("choose one")
    file = {"name": "boat.png", "mimeType": "image/png", "buffer": b"a picture"}
    page.get_by_label("Picture to start from").set_input_files(file)
    write(page, strength=0.5)
    expect(page.locator("#plan")).to_contain_text("Takes 0.10 GB")
    page.get_by_role("button", name="Make").click()
    edit = card(page, "an edit", "done")
    edit.get_by_role("button", name="Vary").click()
    while len(sent) < 2:
        page.wait_for_timeout(50)
    for request in (planned[-1], sent[0]):
        assert request.headers["content-type"].startswith("multipart/form-data")
        for part in (b'name="prompt"\r\n\r\na boat', b'name="strength"\r\n\r\n0.5', b'filename="boat.png"'):
            assert part in request.post_data_buffer
    for part in (b'name="prompt"\r\n\r\nan edit', b'filename="image.png"', b"it came with it"):
        assert part in sent[1].post_data_buffer
    edit.get_by_role("button", name="Again").click()
    expect(page.locator("[name=prompt]")).to_have_value("an edit")
    assert page.locator("[name=image]").evaluate("field => field.files[0].name") == "image.png"


def test_the_server_is_killed_and_started_while_the_page_is_open(page, server):
    write(page, prompt="through it", num_inference_steps=300)
    page.get_by_role("button", name="Make").click()
    expect(card(page, "through it", "running").locator(".state")).to_contain_text("of 300")
    server.kill()
    expect(page.locator("#server")).to_contain_text("does not answer")
    page.get_by_role("button", name="Make").click()
    expect(page.locator("#plan")).to_contain_text("does not answer")
    server.start()
    picture(page, "through it")
    expect(page.locator("#server")).to_contain_text("seascapes")
