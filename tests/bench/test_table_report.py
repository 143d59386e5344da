"""The table as markdown, for a terminal, as JSON and as a picture, from made-up runs."""

import json

import pytest
from PIL import Image
from rich.console import Console
from tests.bench import samples

from lowtide.bench import table_report as reports
from lowtide.bench.plot import draw_plot


def lines(report):
    """The cells of the markdown table, row by row."""
    table = reports.markdown_table(report).splitlines()
    assert len({line.replace("\\|", "").count("|") for line in table}) == 1
    return [[cell.strip() for cell in line.replace("\\|", "¦")[1:-1].split("|")] for line in table]


def test_the_documents_columns_and_memory():
    heads, _, *rows = lines(
        samples.report(
            samples.run("original", samples.reading(9.5, 4 * 10**9)),
            samples.run("half", samples.reading(3.5, 2 * 10**9)),
            samples.run("half", samples.reading(3.7, 10**9), 2),
        )
    )
    assert heads == ["technique", "latency, s", "speed-up", "peak memory, GB", "of original"]
    assert rows == [
        ["original", "9.50", "x1.00", "4.00", "100%"],
        ["half precision", "3.60 (3.50 to 3.70)", "x2.64", "2.00", "50%"],
    ]


def test_a_peer_has_its_own_columns_and_ratios():
    report = samples.report(
        samples.run("half", samples.reading(1.0, 10**9)),
        samples.run("half", samples.reading(2.0, 4 * 10**9), library="diffusers"),
        samples.run("vae-exact", samples.reading(2.0, 10**9)),
        peer="diffusers",
    )
    heads, _, half, exact = lines(report)
    assert heads[5:] == [
        "diffusers: latency, s",
        "diffusers: peak, GB",
        "ours / diffusers: latency",
        "ours / diffusers: peak",
    ]
    assert half[5:] == ["2.00", "4.00", "0.50", "0.25"]
    assert exact[5:] == ["–"] * 4


def test_on_a_gpu_reserved_and_host_memory_are_there_too():
    on_gpu = samples.reading(device_allocated=10**9, device_reserved=2 * 10**9, peak=3 * 10**9, gpu="A GPU")
    report = samples.report(samples.run("half", on_gpu))
    heads, _, row = lines(report)
    assert heads[3:] == ["peak memory, GB", "of half precision", "reserved, GB", "host, GB"]
    assert row[3:] == ["1.00", "100%", "2.00", "3.00"]
    assert "A GPU" in reports.title(report)
    assert "allocated on the device" in reports.how(report)


def test_a_failure_fills_its_cell_and_leaves_the_others():
    report = samples.report(
        samples.run("original", "MemoryError: no | memory <here>"),
        samples.run("half", samples.reading(2.0)),
    )
    _, _, original, half = lines(report)
    assert original == ["original", "failed: MemoryError: no ¦ memory \\<here>", "–", "–", "–"]
    assert half == ["half precision", "2.00", "–", "1.00", "–"]


def test_without_the_original_the_first_row_is_x1_and_that_is_said():
    report = samples.report(
        samples.run("half", samples.reading(2.0)),
        samples.run("traced", samples.reading(1.0)),
    )
    heads, _, *rows = lines(report)
    assert heads[4] == "of half precision"
    assert [row[2] for row in rows] == ["x1.00", "x2.00"]
    assert "`original` was left out" in reports.markdown(report)
    assert "left out" not in reports.how(samples.report(samples.run("original", samples.reading())))


def test_the_markdown_file_tells_how_where_and_what_is_equal():
    report = samples.report(
        samples.run("half", samples.reading()),
        samples.run("vae-slicing", samples.reading()),
        samples.run("traced", samples.reading()),
        samples.run("traced", "killed (out of memory?)", 2),
        batch=2,
    )
    text = reports.markdown(report)
    assert text.startswith("# owner/name, 2 pictures of 32x16, 1 DDIM step, bfloat16, A Processor\n")
    for part in (
        "fresh process",
        "byte for byte: vae-slicing, traced",
        "traced (lowtide) failed in a later round: killed",
        "command: `lowtide bench table`",
        "A Processor, 2 processors, 17.18 GB",
        "versions: torch 2",
    ):
        assert part in text
    assert "stopped early" not in text
    assert "not every technique has 2 runs" in reports.markdown(
        samples.report(samples.run("half", samples.reading()), rounds=2)
    )


def test_a_terminals_table_points_to_the_reasons():
    report = samples.report(samples.run("half", "lost"), samples.run("traced", "lost"), samples.run("fp8", "other"))
    (table,), reasons = reports.rich_tables(report, 100)
    assert reasons == ["[1] lost", "[2] other"]
    console = Console(width=100)
    with console.capture() as capture:
        console.print(table)
    assert capture.get().count("failed [1]") == 2


@pytest.mark.parametrize(("width", "count"), [(80, 2), (140, 1)])
def test_a_narrow_terminal_loses_no_figure(width, count):
    report = samples.report(
        samples.run("original", samples.reading(3.0, 5 * 10**9)),
        samples.run("original", samples.reading(2.0, 4 * 10**9), library="diffusers"),
        samples.run("original", samples.reading(2.0, 3 * 10**9), 2, library="diffusers"),
        peer="diffusers",
    )
    console = Console(width=width)
    tables, _ = reports.rich_tables(report, width)
    with console.capture() as capture:
        console.print(*tables)
    assert len(tables) == count
    for figure in ("3.00", "x1.00", "5.00", "100%", "(2.00", "4.00", "1.50", "1.25"):
        assert figure in capture.get()


def test_json_holds_every_run_and_is_replaced_as_a_whole(tmp_path, monkeypatch):
    report = samples.report(samples.run("half", samples.reading(2.0)), samples.run("half", "lost", 2), out=tmp_path)
    path = reports.write_json(report, complete=False)
    found = json.loads(path.read_text())
    assert found["complete"] is False
    assert found["options"]["rows"] == ["half"]
    assert [(run["round"], run["failure"]) for run in found["runs"]] == [(1, None), (2, "lost")]
    assert found["runs"][0]["reading"]["latency"] == 2.0
    monkeypatch.setattr("pathlib.Path.replace", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        reports.write_json(report, complete=True)
    assert json.loads(path.read_text()) == found
    assert [one.name for one in tmp_path.iterdir()] == ["table.json"]


def test_the_plot_has_a_dot_for_each_pair_of_figures(tmp_path):
    pytest.importorskip("matplotlib")
    report = samples.report(
        samples.run("original", samples.reading(9.0, 4 * 10**9)),
        samples.run("half", samples.reading(1.0, 10**9)),
        samples.run("half", samples.reading(2.0, 10**9), library="diffusers"),
        samples.run("traced", "lost"),
        samples.run("fp8", samples.reading(peak=None)),
        peer="diffusers",
        out=tmp_path,
    )
    with Image.open(draw_plot(report)) as picture:
        assert picture.size == (1650, 1125)
        assert len(picture.getcolors(2**24)) > 10
