"""Models within one budget: pictures made together, plans for less, and what was made before."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from lowtide.cli.request import shipped_model
from lowtide.measuring.peaks import resident_memory
from lowtide.planning.plan import Budgets
from lowtide.serve import engine as engines
from lowtide.serve.engine import Engine
from lowtide.serve.run_request import Along, Run

CALL = {"prompt": "a boat", "width": 64, "height": 64, "num_inference_steps": 3}
SEEDS = [5, 6, 7]


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    ram = resident_memory() + 10**9  # of this process, which may have run other tests
    return Engine({"seascapes": str(shipped_model())}, ram=ram, device="cpu", notes=str(tmp_path_factory.mktemp("n")))


def run(engine, folder, seeds=SEEDS, call=CALL, **options):
    folder.mkdir(exist_ok=True)
    answer = engine.run(Run("seascapes", dict(call), list(seeds), folder, {}, **options), lambda **_: None)
    assert answer["files"] == [f"{place}.png" for place in range(len(seeds))]
    return answer, [np.array(Image.open(folder / name)).astype(int) for name in answer["files"]]


def test_pictures_made_together_are_the_same_up_to_rounding(engine, tmp_path, monkeypatch):
    alone, pictures = run(engine, tmp_path / "alone")
    monkeypatch.setattr(engines, "FASTER", 100.0)
    together, same = run(engine, tmp_path / "together", together=3)
    assert "3 × 64x64" in together["plan"]
    assert "3 × 64x64" not in alone["plan"]
    for one, other in zip(pictures, same, strict=True):
        assert np.abs(one - other).max() <= 2
    assert np.abs(pictures[0] - pictures[1]).max() > 50, "and they are three pictures"


def test_pictures_are_made_alone_where_that_is_as_fast(engine, tmp_path, monkeypatch):
    monkeypatch.setattr(engines, "FASTER", 0.01)
    answer, _ = run(engine, tmp_path / "alone", together=3)
    assert "3 × 64x64" not in answer["plan"]


def test_pictures_of_other_jobs_are_made_along_where_a_call_has_room(engine, tmp_path, monkeypatch):
    monkeypatch.setattr(engines, "FASTER", 100.0)
    along = [Along({"prompt": f"a {colour} boat"}, [8, 9], tmp_path / colour) for colour in ("red", "blue")]
    _, pictures = run(engine, tmp_path / "own", together=4, along=along)
    made = [str(file.relative_to(tmp_path)) for each in along for file in each.folder.glob("*")]
    assert made == ["red/0.png"], "three of its own, and one more"
    answer, others = run(engine, tmp_path / "red", seeds=[8, 9], call=CALL | along[0].texts)
    assert "measured" in answer, "the second was left to make"
    _, plain = run(engine, tmp_path / "plain", seeds=[8, 9], call=CALL | along[0].texts)
    for one, other in zip(others, plain, strict=True):
        assert np.abs(one - other).max() <= 2
    assert np.abs(others[0] - pictures[0]).max() > 50


def test_what_was_made_is_not_made_again(engine, tmp_path):
    _, pictures = run(engine, tmp_path / "kept")
    (tmp_path / "kept" / "1.png").unlink()
    before = (tmp_path / "kept" / "0.png").stat().st_mtime_ns
    answer, again = run(engine, tmp_path / "kept")
    assert all(map(np.array_equal, pictures, again))
    assert (tmp_path / "kept" / "0.png").stat().st_mtime_ns == before
    assert answer["measured"] <= answer["peak"]
    answer, _ = run(engine, tmp_path / "kept")  # as after a death between the last file and the answer
    assert "measured" not in answer


def test_a_run_keeps_to_less_than_the_budget(engine, tmp_path):
    most = engine.plan("seascapes", CALL)["needs"]["ram"]
    plan = engine.plan("seascapes", CALL, within=Budgets(None, most + 2**20))
    assert plan["fits"]
    assert not engine.plan("seascapes", CALL, within=Budgets(None, 10**8))["fits"]
    answer, _ = run(engine, tmp_path / "less", within=Budgets(None, most + 2**25))
    assert answer["needs"]["ram"] <= most + 2**25
