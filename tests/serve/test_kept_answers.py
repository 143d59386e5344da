"""What a network answered is kept: the next attempt computes the rest alone, and gives the same bits."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests import tiny, tiny_video

from lowtide.schedulers import SCHEDULERS
from lowtide.serve import kept_answers
from lowtide.serve.kept_answers import KeptAnswers

CALL = {"prompt": "a boat", "num_inference_steps": 6, "output_type": "pt"}


class StoppedError(Exception):
    pass


def pictures(folder, name):
    schedule = SCHEDULERS[name].from_config(tiny.scheduler().config)
    pipe = tiny.pipeline(folder / "words", schedule=schedule)
    return pipe, {**CALL, "height": 32, "width": 32}


def clips(folder, name):
    return tiny_video.pipeline(folder, schedule=tiny_video.scheduler(name)), {**CALL, "use_dynamic_cfg": False}


def run(pipe, call, folder, stop=None, seed=0):
    """What comes out of a call that ends by an error at the step `stop`, and how many answers were new."""

    def after(_pipe, step, _timestep, _tensors):
        if step + 1 == stop:
            raise StoppedError
        return {}

    with KeptAnswers(pipe, folder) as answers:
        output = pipe(**call, generator=torch.Generator().manual_seed(seed), callback_on_step_end=after)
    return output[0] if isinstance(output, tuple) else next(iter(vars(output).values())), answers.new


@pytest.fixture(autouse=True)
def at_once(monkeypatch):
    monkeypatch.setattr(kept_answers, "SECONDS", 0.0)


@pytest.mark.parametrize(
    ("make", "name", "calls"),
    [
        (pictures, "DDIMScheduler", 6),
        (pictures, "PNDMScheduler", 15),
        (pictures, "DPMSolverMultistepScheduler", 6),
        (pictures, "UniPCMultistepScheduler", 6),
        (pictures, "EulerDiscreteScheduler", 6),
        (clips, "CogVideoXDDIMScheduler", 6),
        (clips, "CogVideoXDPMScheduler", 6),
    ],
)
def test_a_call_goes_on_where_it_was(tmp_path, make, name, calls):
    pipe, call = make(tmp_path, name)
    expected, new = run(pipe, call, tmp_path / "whole")
    assert new == calls
    with pytest.raises(StoppedError):
        run(pipe, call, tmp_path / "kept", stop=4)
    again, new = run(pipe, call, tmp_path / "kept")
    assert new == calls - 3, "four were known, of which the first is computed in any case"
    assert torch.equal(again, expected)
    assert "forward" not in vars(pipe.unet if make is pictures else pipe.transformer)


def test_what_was_kept_of_another_call_is_not_answered(tmp_path):
    pipe, call = pictures(tmp_path, "DDIMScheduler")
    run(pipe, call, tmp_path / "kept")
    expected, _ = run(pipe, call, tmp_path / "other", seed=1)
    again, new = run(pipe, call, tmp_path / "kept", seed=1)
    assert new == 6
    assert torch.equal(again, expected)


def test_answers_are_used(tmp_path):
    """The negative control: wrong answers change the picture."""
    pipe, call = pictures(tmp_path, "DDIMScheduler")
    expected, _ = run(pipe, call, tmp_path / "kept")
    for file in (tmp_path / "kept").rglob("*.safetensors"):
        save_file({name: tensor + 1 for name, tensor in load_file(file).items()}, file)
    again, _ = run(pipe, call, tmp_path / "kept")
    assert not torch.equal(again, expected)


def test_files_that_are_not_whole_are_computed_again(tmp_path):
    pipe, call = pictures(tmp_path, "DDIMScheduler")
    expected, _ = run(pipe, call, tmp_path / "kept")
    files = sorted((tmp_path / "kept").rglob("*.safetensors"))
    files[2].write_bytes(files[2].read_bytes()[:-20])
    files[3].write_bytes(b"")
    again, new = run(pipe, call, tmp_path / "kept")
    assert new == 3
    assert torch.equal(again, expected)


def test_a_full_disk_ends_the_keeping_alone(tmp_path, monkeypatch):
    pipe, call = pictures(tmp_path, "DDIMScheduler")
    expected, _ = run(pipe, call, tmp_path / "whole")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(kept_answers, "save_file", full)
    again, _ = run(pipe, call, tmp_path / "kept")
    assert torch.equal(again, expected)
    assert not list((tmp_path / "kept").rglob("*.safetensors"))


def test_within_a_budget_too(tmp_path):
    pipe, call = pictures(tmp_path, "PNDMScheduler")
    expected, _ = run(pipe, call, tmp_path / "whole")
    pipe.fit(ram="3GB", device="cpu")
    with pytest.raises(StoppedError):
        run(pipe, call, tmp_path / "kept", stop=3)
    again, _ = run(pipe, call, tmp_path / "kept")
    assert torch.equal(again, expected)
    pipe.unfit()
    pipe.enable_sequential_cpu_offload(device="cpu")
    again, _ = run(pipe, call, tmp_path / "kept")
    assert torch.equal(again, expected)
