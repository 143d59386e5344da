"""Several models at one server: clips, pictures from pictures, previews on the way, and jobs that run together."""

from __future__ import annotations

import base64
import io
import json
import urllib.request

import numpy as np
import pytest
import torch
from PIL import Image
from tests import tiny_video
from tests.guests.families_unets import sdxl_from_picture
from tests.guests.family import picture
from tests.serve.server import Server

import lowtide
from lowtide.cli.request import shipped_model

pytest.importorskip("fastapi")
ASKED = {"prompt": "a boat", "width": 128, "height": 128, "num_inference_steps": 4, "seed": 7}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    tiny_video.write_checkpoint(folder / "clips")
    sdxl_from_picture().pipeline.save_pretrained(folder / "edits")
    return {"seascapes": shipped_model(), "clips": folder / "clips", "edits": folder / "edits"}


@pytest.fixture(scope="module")
def server(tmp_path_factory, models):
    named = [f"{name}={path}" for name, path in models.items()]
    server = Server(tmp_path_factory.mktemp("served"), *named, "--ram", "3GB", "--at-once", "2")
    server.wait_until_ready()
    yield server
    assert server.stop() == 0


def form(server, path, fields, **files):
    """The status and the answer of a form with files."""
    limit, body = "limit", b""
    for name, value in fields.items():
        body += f'--{limit}\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'.encode()
    for name, content in files.items():
        head = f'--{limit}\r\nContent-Disposition: form-data; name="{name}"; filename="a.png"\r\n\r\n'
        body += head.encode() + content + b"\r\n"
    body += f"--{limit}--\r\n".encode()
    return server.ask("POST", path, body, Content_Type=f"multipart/form-data; boundary={limit}")


def png(image):
    content = io.BytesIO()
    image.save(content, format="PNG")
    return content.getvalue()


def pixels(content):
    return np.array(Image.open(io.BytesIO(content)))


def test_what_the_models_can(server):
    status, told = server.ask("GET", "/capabilities")
    assert status == 200
    about = {model["name"]: model for model in told["models"]}
    assert [about[name]["makes"] for name in ("seascapes", "clips", "edits")] == ["pictures", "clips", "pictures"]
    assert about["seascapes"]["size"] == {"width": 128, "height": 128}
    assert {"ddim", "euler"} <= set(about["seascapes"]["samplers"])
    assert "image" in about["edits"]["arguments"]
    assert told["budget"]["ram"] == 3 * 10**9


# ---- pictures from pictures

EDIT = {"prompt": "a red boat", "model": "edits", "num_inference_steps": 3, "strength": 0.9, "seed": 3}


def test_a_picture_from_a_picture_is_that_of_a_plain_run(server, models):
    status, answer = form(server, "/v1/images/edits", EDIT, image=png(picture(64, 48)))
    assert status == 200
    pipe = lowtide.load(str(models["edits"]), ram="2GB", device="cpu", image=picture(64, 48), prompt="a red boat")
    call = {name: EDIT[name] for name in ("prompt", "num_inference_steps", "strength")}
    plain = pipe(**call, image=picture(64, 48), generator=torch.Generator().manual_seed(3)).images[0]
    assert np.array_equal(pixels(base64.b64decode(answer["data"][0]["b64_json"])), np.array(plain))
    job = server.ask("GET", f"/jobs/{answer['job']}")[1]
    assert "pictures" not in job, "where files rest is nobody's business"


BOMB = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0\x01\x86\xa0\0\x01\x86\xa0\x08\x02\0\0\0"
"""The beginning of a PNG of 100,000 x 100,000 pixels."""
PNG = png(picture(64, 48))
REFUSED_FORMS = {
    "no picture": (EDIT, {}, 422, "image"),
    "a picture that is none": (EDIT, {"image": b"GIF89a"}, 422, "no picture"),
    "a picture that is cut off": (EDIT, {"image": PNG[:-200]}, 422, "read"),
    "a bomb": (EDIT, {"image": BOMB}, 422, "image"),
    "a path": ({**EDIT, "image": "/etc/passwd"}, {}, 422, "file"),
    "no prompt": ({"model": "edits"}, {"image": PNG}, 422, "prompt"),
    "a mask for a model without": (EDIT, {"image": PNG, "mask": PNG}, 422, "mask_image"),
    "a model that takes none": ({**EDIT, "model": "seascapes"}, {"image": PNG}, 422, "image"),
    "a body that is too long": (EDIT, {"image": b"\0" * (2**25 + 1)}, 413, "bytes"),
}


@pytest.mark.parametrize("name", REFUSED_FORMS)
def test_forms_that_are_refused(server, name):
    fields, files, expected, told = REFUSED_FORMS[name]
    status, problem = form(server, "/v1/images/edits", fields, **files)
    assert (status, told in problem["detail"]) == (expected, True), problem


# ---- OpenAI's client


@pytest.fixture
def client(server):
    openai = pytest.importorskip("openai")
    with openai.OpenAI(base_url=f"{server.address}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_openais_client_edits_a_picture(client):
    more = {name: EDIT[name] for name in ("num_inference_steps", "strength", "seed")}
    answer = client.images.edit(model="edits", prompt="a red boat", image=io.BytesIO(PNG), extra_body=more)
    assert pixels(base64.b64decode(answer.data[0].b64_json)).shape == (64, 48, 3)


def test_openais_client_gets_a_stream(client):
    events = list(
        client.images.generate(
            prompt="a boat", size="128x128", stream=True, partial_images=1, extra_body={"num_inference_steps": 4}
        )
    )
    assert [event.type for event in events] == ["image_generation.partial_image", "image_generation.completed"]
    assert pixels(base64.b64decode(events[-1].b64_json)).shape == (128, 128, 3)


@pytest.mark.filterwarnings("ignore:The Sora API:DeprecationWarning")
def test_openais_client_makes_a_clip(client):
    more = {"num_inference_steps": 2, "num_frames": 9}
    video = client.videos.create_and_poll(model="clips", prompt="a boat", size="48x32", extra_body=more)
    assert (video.status, video.progress, video.error) == ("completed", 100, None)
    assert client.videos.download_content(video.id).read()[4:8] == b"ftyp"
    assert [each.id for each in client.videos.list()] == [video.id]
    assert client.videos.delete(video.id).deleted


def test_other_bodies_are_refused(server):
    assert server.ask("POST", "/v1/images/edits", b"x", Content_Type="text/plain")[0] == 415
    assert server.ask("POST", "/v1/images/edits", b"x", Content_Type="multipart/form-data; boundary=x")[0] == 400
    assert server.ask("POST", "/v1/images/edits", b"x", Content_Type="multipart/form-data")[0] == 400
    assert server.ask("POST", "/v1/videos", b"{", Content_Type="application/json")[0] == 422


# ---- clips


def test_a_clip(server):
    asked = {
        "model": "clips",
        "prompt": "a boat",
        "size": "48x32",
        "num_frames": 9,
        "num_inference_steps": 2,
        "seed": 1,
    }
    status, video = server.ask("POST", "/v1/videos", asked)
    assert (status, video["object"], video["size"], video["seconds"]) == (200, "video", "48x32", "1")
    server.ended(video["id"])
    video = server.ask("GET", f"/v1/videos/{video['id']}")[1]
    assert (video["status"], video["progress"], video["error"]) == ("completed", 100, None)
    status, headers, content = server.asked("GET", f"/v1/videos/{video['id']}/content")
    assert (status, headers["Content-Type"], content[4:8]) == (200, "video/mp4", b"ftyp")
    assert [each["id"] for each in server.ask("GET", "/v1/videos")[1]["data"]] == [video["id"]]
    assert server.ask("DELETE", f"/v1/videos/{video['id']}")[1]["deleted"]
    assert server.ask("GET", f"/v1/videos/{video['id']}")[0] == 404
    assert server.ask("GET", "/v1/videos")[1]["data"] == []


def test_a_model_of_pictures_makes_no_clips(server):
    status, problem = server.ask("POST", "/v1/videos", {"prompt": "a boat", "seconds": 2})
    assert (status, "pictures" in problem["detail"]) == (422, True)


# ---- on the way


def stream(server, content):
    body = json.dumps({**content, "stream": True}).encode()
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{server.address}/v1/images/generations", body, headers)
    with urllib.request.urlopen(request, timeout=60) as lines:
        return [json.loads(line[5:]) for line in lines if line.startswith(b"data:")]


def test_a_stream_gives_previews_and_then_the_picture(server):
    asked = {"prompt": "a boat", "size": "128x128", "num_inference_steps": 6, "seed": 7}
    events = stream(server, {**asked, "partial_images": 2})
    kinds = ["image_generation.partial_image"] * 2 + ["image_generation.completed"]
    assert [event["type"] for event in events] == kinds
    assert [event["partial_image_index"] for event in events[:2]] == [0, 1]
    assert pixels(base64.b64decode(events[0]["b64_json"])).shape == (16, 16, 3)
    plain = server.ask("POST", "/v1/images/generations", asked)[1]["data"][0]["b64_json"]
    assert events[-1]["b64_json"] == plain
    webp = server.ask("POST", "/v1/images/generations", {**asked, "output_format": "webp"})[1]["data"][0]["b64_json"]
    assert Image.open(io.BytesIO(base64.b64decode(webp))).format == "WEBP"


def test_events_tell_of_steps_memory_and_previews(server):
    job = server.ask("POST", "/jobs", {**ASKED, "num_inference_steps": 30, "n": 2})[1]["id"]
    events = [event for event in server.events(job) if event["state"] == "running"]
    last = events[-1]
    assert (last["picture"], last["pictures"], last["steps"]) == (1, 2, 30)
    assert all(event["memory"]["used"] <= event["memory"]["budget"] == 3 * 10**9 for event in events)
    assert last["seconds_left"] < 10
    assert pixels(base64.b64decode(last["preview"])).shape == (16, 16, 3)


def test_another_sampler_gives_another_picture(server):
    jobs = [server.ask("POST", "/jobs", {**ASKED, **more})[1]["id"] for more in ({}, {"sampler": "euler"}, {})]
    contents = [server.ask("GET", f"/jobs/{job}/content/0")[1] for job in jobs if server.ended(job)["state"] == "done"]
    assert contents[0] == contents[2] != contents[1]
    status, problem = server.ask("POST", "/plan", {**ASKED, "sampler": "nothing"})
    assert (status, "euler" in problem["possible"]) == (422, True)
    assert server.ask("POST", "/plan", {"model": "edits", "prompt": "x", "sampler": "euler"})[0] == 422


def test_a_job_has_the_pictures_that_came_with_it(server):
    taken = form(server, "/jobs", EDIT, image=PNG)[1]
    assert taken["given"] == {"image": [f"/jobs/{taken['id']}/given/image/0"]}
    status, content = server.ask("GET", taken["given"]["image"][0])
    assert (status, Image.open(io.BytesIO(content)).size) == (200, Image.open(io.BytesIO(PNG)).size)
    for path in ("image/1", "mask/0", "x/0"):
        assert server.ask("GET", f"/jobs/{taken['id']}/given/{path}")[0] == 404
    server.ended(taken["id"])


def test_jobs_that_fit_together_run_together(server):
    long, short = {**ASKED, "num_inference_steps": 400}, {**ASKED, "model": "clips", "width": 48, "height": 32}
    first = server.ask("POST", "/jobs", long)[1]["id"]
    second = server.ask("POST", "/jobs", {**short, "num_frames": 9, "num_inference_steps": 2})[1]["id"]
    assert server.ended(second)["state"] == "done"
    assert server.ask("GET", f"/jobs/{first}")[1]["state"] == "running"
    server.ask("POST", f"/jobs/{first}/cancel")
    assert server.ended(first)["state"] == "cancelled"
