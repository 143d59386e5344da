"""Every technique on a tiny pipeline, measured in this process; and the process's own words."""

import io
import json
import sys

import pytest
import torch
from tests import tiny
from tests.bench import samples

from lowtide.bench import one_run
from lowtide.bench.children import ANSWER
from lowtide.bench.runs import Job
from lowtide.bench.techniques import TECHNIQUES
from lowtide.models.unet import UNet2DConditionModel

SLOW = {"attention": pytest.mark.slow}  # a second trace
CASTING = hasattr(UNet2DConditionModel, "enable_layerwise_casting")
NEEDS_CASTING = {"fp8", "fp8-scaled", "int8", "int8-all", "int4-all", "int8-group-block"}
SAME_AS_HALF = {
    "vae-slicing", "attention-slicing", "model-offload", "sequential-offload", "group-block", "group-leaf",
    "group-block-disk",
}  # fmt: skip
PEER_CAN = ["original", "half", "vae-slicing", "vae-tiling", "group-block", "group-leaf", "group-block-disk", "fp8"]
PEER_CANNOT = ["model-offload", "sequential-offload"]
pytestmark = pytest.mark.filterwarnings("ignore")  # in a process of its own nobody sees them


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    tiny.pipeline(folder / "parts").save_pretrained(folder / "model")
    return str(folder / "model")


@pytest.fixture
def spec(model, tmp_path):
    return lambda technique, library="lowtide", **changes: samples.options(model=model, **changes).spec(
        Job(technique, library), str(tmp_path)
    )


@pytest.fixture(autouse=True)
def gradients():
    yield
    assert torch.is_grad_enabled()


@pytest.fixture(scope="module")
def half(model, tmp_path_factory):
    orders = samples.options(model=model).spec(Job("half", "lowtide"), str(tmp_path_factory.mktemp("half")))
    return one_run.measured(orders)


@pytest.mark.parametrize("name", [pytest.param(one, marks=SLOW.get(one, ())) for one in TECHNIQUES])
def test_every_technique_runs_and_is_measured(name, spec, half):
    if name in NEEDS_CASTING and not CASTING:
        pytest.skip("layerwise casting is not there yet")
    larger = {"batch": 2, "width": 48, "height": 32} if name == "traced" else {}
    with torch.jit.optimized_execution(False):  # which would take seconds, to no use here
        found = one_run.measured(spec(name, **larger))
    assert min(found.load, found.apply, found.latency) >= 0
    assert found.latency > 0
    assert found.device_allocated is None
    assert found.peak_rss is None or found.peak_rss > 10**7
    assert set(found.versions) == {"python", "torch", "transformers", "lowtide"}
    if name in SAME_AS_HALF:
        assert found.checksum == half.checksum
    if name == "original":
        assert found.checksum != half.checksum


def test_several_pictures_at_once_another_seed_and_another_size(spec, half):
    changed = [{"batch": 2}, {"seed": 1}, {"width": 48}, {"steps": 2}, {"prompt": "night"}]
    sums = {one_run.measured(spec("half", **changes)).checksum for changes in changed}
    assert len(sums | {half.checksum}) == 6


@pytest.mark.parametrize("technique", ["half", "group-leaf"])
def test_the_process_answers_in_one_line(technique, spec, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO(json.dumps(vars(spec(technique)))))
    one_run.main()
    answer = json.loads(capsys.readouterr().out.splitlines()[-1])[ANSWER]
    assert answer["reading"]["gpu"] is None


def test_the_process_tells_what_failed(spec, monkeypatch, capsys):
    orders = {**vars(spec("half")), "model": "./no-such-model"}
    monkeypatch.setattr(sys, "stdin", io.StringIO(json.dumps(orders)))
    one_run.main()
    answer = json.loads(capsys.readouterr().out.splitlines()[-1])[ANSWER]
    assert answer["failure"].startswith("FileNotFoundError: ")


@pytest.mark.parity
@pytest.mark.parametrize("name", PEER_CAN)
def test_the_peer_beside_us(name, spec):
    pytest.importorskip("diffusers")
    found = one_run.measured(spec(name, "diffusers"))
    assert found.latency > 0
    assert "diffusers" in found.versions
    if name == "original":
        assert found.checksum == one_run.measured(spec(name)).checksum


@pytest.mark.parity
@pytest.mark.parametrize("name", PEER_CANNOT)
def test_what_the_peer_cannot_do_on_a_cpu_is_an_error(name, spec, monkeypatch):
    pytest.importorskip("diffusers")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(RuntimeError, match="accelerator"):
        one_run.measured(spec(name, "diffusers"))
