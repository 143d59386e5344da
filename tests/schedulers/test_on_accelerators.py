"""Every scheduler on a stand-in for an accelerator: the numbers of a CPU, and no step in which the host waits."""

from __future__ import annotations

import pytest
import torch
from tests.sim_tensor import simulated

from lowtide.schedulers import SCHEDULERS

STEPS = 6


def run(name: str, device: str, waits: list[str]) -> torch.Tensor:
    scheduler = SCHEDULERS[name]()
    scheduler.set_timesteps(STEPS, device=device)
    generator = torch.Generator().manual_seed(0)
    sample = torch.randn(1, 4, 8, 8, generator=generator).to(device)
    seen = []
    for timestep in scheduler.timesteps:
        output = scheduler.scale_model_input(sample, timestep) * 0.5
        sample = scheduler.step(output, timestep, sample, generator=generator).prev_sample
        seen.append(len(waits))
    assert len(set(seen)) == 1, waits[seen[0] :]
    return sample.cpu()


@pytest.mark.parametrize("name", SCHEDULERS)
def test_the_same_numbers_and_no_waiting(name: str) -> None:
    expected = run(name, "cpu", [])
    with simulated() as sim:
        assert torch.equal(run(name, "sim:1", sim.devices[1].counts.waits), expected)
