"""What this process takes beside weights and activations."""

from types import SimpleNamespace

import pytest
import torch
from tests.fitting.fits import RATES

from lowtide.fitting import process
from lowtide.machine.child_process import ChildError
from lowtide.memory import apply_residency

CPU = torch.device("cpu")
MIB = 2**20


def test_larger_networks_and_vocabularies_take_more_of_a_process():
    sizes = [process.compiled(torch.float32, nbytes) for nbytes in (0, 10**8, 10**10, 10**11)]
    assert sizes[0] < sizes[1] < sizes[2] == sizes[3]
    assert process.compiled(torch.bfloat16, 0) > sizes[0]
    assert process.objects(49408) > process.objects(0) > 0


@pytest.mark.slow
def test_what_a_process_takes_by_itself():
    host, device = process.alone(torch.device("cpu"), torch.float32)
    assert 5e7 < host < 3e9
    assert device == 0


def test_it_is_measured_once_and_kept(monkeypatch, tmp_path):
    began = []
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(process, "run_module", lambda *given, **_: began.append(given) or "12345 0")
    assert [process.alone(torch.device("cpu"), torch.float32) for _ in range(2)] == [(12345, 0)] * 2
    assert len(began) == 1


def test_where_it_cannot_be_measured_usual_figures_are_assumed(monkeypatch, tmp_path):
    def fail(*_, **__):
        raise ChildError("killed")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(process, "run_module", fail)
    with pytest.warns(UserWarning, match="usual figures: killed"):
        assert process.alone(torch.device("cpu"), torch.float32) == process.usual_base(torch.device("cpu"))


def test_what_a_process_takes_may_fall_again(monkeypatch):
    """1.2 GB were held for a while and freed: a budget of 1 GB is possible again."""
    subject = SimpleNamespace(dtype=torch.float32, vocabulary=0, modules=dict)
    monkeypatch.setattr(process, "_bases", {})
    monkeypatch.setattr(process, "alone", lambda *_: (380 * MIB, 0))
    bases = []
    for taken in (429, 1629, 429):
        monkeypatch.setattr(process, "resident_memory", lambda taken=taken: taken * MIB)
        bases.append(process.process_rates(RATES, subject, CPU, {}).base // MIB)
    first, full, again = bases
    assert full > first + 1000
    assert again == first


def test_pages_that_were_never_touched_are_not_in_memory(tmp_path):
    """A base of 1,620 MB was taken for 425 MB: mapped weights that nobody had read were subtracted from it."""
    (tmp_path / "numbers").write_bytes(bytes(64 * MIB))
    numbers = torch.from_file(str(tmp_path / "numbers"), shared=False, size=16 * MIB).view(4096, 4096)
    layer = torch.nn.Linear(4096, 4096, bias=False, device="meta")
    layer.weight = torch.nn.Parameter(numbers, requires_grad=False)
    assert process.weights_in_memory([layer]) < 4 * MIB
    assert layer.weight[:2048].sum() == 0
    assert 30 * MIB < process.weights_in_memory([layer]) < 50 * MIB
    assert layer.weight.sum() == 0
    assert 64 * MIB <= process.weights_in_memory([layer, layer]) < 66 * MIB  # each byte once


def test_weights_at_rest_in_host_memory_are_weights(monkeypatch):
    network = torch.nn.Sequential(*[torch.nn.Linear(1024, 1024, bias=False) for _ in range(4)])
    before = process.weights_in_memory([network])
    apply_residency(network, 0, rest="host", device="cpu")
    assert 16 * MIB <= process.weights_in_memory([network]) <= before + MIB
