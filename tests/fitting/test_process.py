"""What this process takes beside weights and activations."""

import pytest
import torch

from lowtide.fitting import process
from lowtide.machine.child_process import ChildError


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
