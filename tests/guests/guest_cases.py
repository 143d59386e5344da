"""What the tests of guests share: which families are in the default run, budgets, and comparison."""

from dataclasses import replace

import pytest
from tests.fitting.fits import RATES
from tests.guests.families import FAMILIES

from lowtide.guests.doors import fit
from lowtide.planning.plan import BudgetError


def families(*in_default):
    """All families as parameters, `slow` but for those that are named."""
    return [pytest.param(name, marks=() if name in in_default else pytest.mark.slow) for name in FAMILIES]


CASES = families("Flux2 Klein", "ZImage", "Wan of two transformers", "LTX")
"""A list of embeddings, two denoisers, clips; `slow` has several networks in each step, combined pipelines, and all."""
ROWS = 1e-5
"""How far a picture decoded row by row may be from one decoded at once: pictures are in [0, 1] or [-1, 1]."""
WARNINGS = [  # the peer's own
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:`FluxPosEmbed` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:`callback_steps` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:The default of `overwrite_modular_index`:FutureWarning"),
    pytest.mark.filterwarnings("ignore:In CPU autocast:UserWarning"),
]


def steady(patch):
    """Have plans count a process that takes the same at all times."""
    patch.setattr("lowtide.fitting.prepare._rates", lambda *_: replace(RATES, base=10**8))


def least(pipe, **call):
    """The least `ram` that a call can be planned for, in bytes: what a budget that is too small is refused with."""
    with pytest.raises(BudgetError) as refusal:
        fit(pipe, ram="10MB", **call)
    return refusal.value.minimum.ram


def weights_of(pipe):
    """Bytes of all weights of a pipeline."""
    from lowtide.guests.networks import networks_of

    return sum(weight.numel() * weight.itemsize for part in networks_of(pipe).values() for weight in part.parameters())
