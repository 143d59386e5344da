"""Trajectories against recorded ones of the peer, for machines that do not have it."""

import json
from pathlib import Path

import pytest
import torch
from tests.schedulers.trajectories import seeded, start, toy_model, trajectory, worst_difference

from lowtide.schedulers import SCHEDULERS

GOLDENS = json.loads((Path(__file__).parents[1] / "goldens" / "schedulers.json").read_text(encoding="utf-8"))
CASES = GOLDENS["cases"]
TOLERANCE = 1e-6


def run(case, model=toy_model):
    """Our samples and the recorded ones, and our timesteps."""
    name = case["entries"]["_class_name"]
    scheduler = SCHEDULERS[name].from_config(case["entries"])
    ours = trajectory(scheduler, 8, start(1, shape=(1, 1, 2, 3)), model=model, **seeded(name, case["entries"]))
    theirs = [torch.tensor(sample).reshape(1, 1, 2, 3) for sample in case["samples"]]
    return ours, theirs, scheduler.timesteps.tolist()


@pytest.mark.parametrize("name", CASES)
def test_golden_trajectory(name):
    ours, theirs, timesteps = run(CASES[name])
    assert timesteps == pytest.approx(CASES[name]["timesteps"], rel=TOLERANCE)
    assert worst_difference(ours, theirs) <= TOLERANCE


@pytest.mark.parametrize("name", CASES)
def test_golden_sees_a_changed_model(name):
    """Negative control: a model output off by a hundred-thousandth is found out."""
    ours, theirs, _ = run(CASES[name], model=lambda x, t: toy_model(x, t) * (1 + 1e-5))
    assert worst_difference(ours, theirs) > TOLERANCE


def test_every_scheduler_has_a_golden():
    assert {case["entries"]["_class_name"] for case in CASES.values()} == set(SCHEDULERS)
