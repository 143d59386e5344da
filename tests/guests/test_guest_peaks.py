"""The peak of a guest's whole call, predicted without a weight, beside the measured one: bytes of tensors."""

import pytest
import torch
from tests.guests.families import FAMILIES, run
from tests.guests.guest_cases import CASES, WARNINGS
from tests.memory_peaks import peak_bytes

from lowtide.guests.guest import Guest
from lowtide.prediction.convolutions import has_avx512
from lowtide.prediction.multiplier import Multiplier

pytest.importorskip("diffusers")
pytestmark = WARNINGS
BYTES_OF_SMALL_TENSORS = 4096
"""Tensors that code makes beside those that networks touch, such as masks, in tiny runs of about a million bytes."""
NOT_IN_HALF = {
    "DDPM": "its own code makes arrays of numpy, which has no bfloat16",
    "Kandinsky 5": "it has layers that stay in float32 where it is loaded in half precision, and is not loaded here",
}


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", CASES)
def test_the_peak_is_the_measured_one(name, dtype):
    if name in NOT_IN_HALF and dtype is not torch.float32:
        pytest.skip(NOT_IN_HALF[name])
    family = FAMILIES[name]()
    guest = Guest(family.pipeline)
    for network in guest.modules().values():
        network.to(dtype)
    workload = guest.on_meta(torch.device("cpu")).workload(guest.usual_size(**family.call))
    largest = max((stage.ways["whole"] for stage in workload.stages), key=lambda call: call.peak)
    run(family)
    measured = peak_bytes(lambda: run(family))
    most = 1.05 if has_avx512() else 1.1  # rules of convolutions are upper estimates elsewhere
    is_estimate = Multiplier.of(dtype) is Multiplier.AMX  # what its kernels take beside tensors was measured for some
    assert measured - BYTES_OF_SMALL_TENSORS <= largest.peak
    assert largest.peak - (largest.workspace if is_estimate else 0) <= most * measured
