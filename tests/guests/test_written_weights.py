"""A pipeline whose call writes to a network's own weights: that network stays resident, so that nothing is lost."""

import pytest
import torch
from tests.guests.families import FAMILIES, run
from tests.guests.guest_cases import WARNINGS, least

import lowtide

pytest.importorskip("diffusers")
pytestmark = WARNINGS


def write(layer):
    """As Shap-E does with the weights that its renderer is given."""
    with torch.no_grad():
        layer.bias.fill_(0.3)


def give_another(layer):
    """As Stable unCLIP does with its normalizer, which it moves to where it computes."""
    layer.bias = torch.nn.Parameter(layer.bias.to("cpu") * 0 + 0.3, requires_grad=False)


def touching(pipe, touch):
    """Have a pipeline's call do this to a layer of its network first."""
    own = type(pipe)

    def call(self, *args, **kwargs):
        touch(self.unet.conv_out)
        return own.__call__(self, *args, **kwargs)

    pipe.__class__ = type(own.__name__, (own,), {"__call__": call, "__module__": own.__module__})


@pytest.mark.parametrize("touch", [write, give_another])
def test_it_computes_what_the_plain_one_does(touch):
    family = FAMILIES["DDPM"]()
    streamed = lowtide.fit(family.pipeline, ram=least(family.pipeline, **family.call), **family.call)
    before = run(family)
    lowtide.unfit(family.pipeline)
    touching(family.pipeline, touch)  # its class is another one now, too
    plan = lowtide.fit(family.pipeline, ram=least(family.pipeline, **family.call), **family.call)
    made = run(family)
    lowtide.unfit(family.pipeline)
    assert streamed.components["unet"].rule is not None
    assert plan.components["unet"].rule is None
    assert torch.equal(made, run(family))
    assert not torch.equal(made, before)
