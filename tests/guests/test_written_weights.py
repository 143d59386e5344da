"""A pipeline whose call writes to a network's own weights: that network stays resident, so that nothing is lost."""

import pytest
import torch
from tests.guests.families import FAMILIES, run
from tests.guests.guest_cases import WARNINGS, least

import lowtide

pytest.importorskip("diffusers")
pytestmark = WARNINGS


def writing(pipe):
    """Have a pipeline's call write to its network first, as Shap-E does with the weights that its renderer is given."""
    own = type(pipe)

    def call(self, *args, **kwargs):
        with torch.no_grad():
            self.unet.conv_out.bias.fill_(0.3)
        return own.__call__(self, *args, **kwargs)

    pipe.__class__ = type(own.__name__, (own,), {"__call__": call, "__module__": own.__module__})


def test_it_computes_what_the_plain_one_does():
    family = FAMILIES["DDPM"]()
    streamed = lowtide.fit(family.pipeline, ram=least(family.pipeline, **family.call), **family.call)
    before = run(family)
    lowtide.unfit(family.pipeline)
    writing(family.pipeline)  # its class is another one now, too
    plan = lowtide.fit(family.pipeline, ram=least(family.pipeline, **family.call), **family.call)
    made = run(family)
    lowtide.unfit(family.pipeline)
    assert streamed.components["unet"].rule is not None
    assert plan.components["unet"].rule is None
    assert torch.equal(made, run(family))
    assert not torch.equal(made, before)
