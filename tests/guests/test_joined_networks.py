"""Components that join several networks, each saved in a folder of its own: loaded within a budget as others are."""

import json
import warnings
from dataclasses import replace

import pytest
import torch
from tests.guests.families import run
from tests.guests.families_unets import TEXT_CALL, controlnet, small_parts, unet
from tests.guests.family import family, modules_of, picture, ready, saved_and_loaded
from tests.guests.guest_cases import ROWS, WARNINGS

import lowtide
from lowtide.configs import CheckpointError
from lowtide.guests.checkpoint import GuestCheckpoint
from lowtide.hub import Source
from lowtide.memory.attach import attachment_of
from lowtide.memory.store import DiskRest
from lowtide.planning.plan import BudgetError

pytest.importorskip("diffusers")
pytestmark = WARNINGS
FEW = {
    "block_out_channels": [8, 16],
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
}
PICTURES = {"image": [picture(64, 48), picture(64, 48, seed=1)]}


def two_controls():
    from diffusers import StableDiffusionControlNetPipeline

    few = {name: value for name, value in FEW.items() if name != "up_block_types"}
    networks = [ready(controlnet(**few), seed) for seed in (0, 1)]
    pipe = StableDiffusionControlNetPipeline(**small_parts(unet=unet(**FEW), controlnet=networks))
    return family(pipe, {**TEXT_CALL, **PICTURES, "controlnet_conditioning_scale": [0.7, 0.4]})


def two_adapters():
    from diffusers import StableDiffusionAdapterPipeline, T2IAdapter

    shape = {"channels": [8, 16], "num_res_blocks": 1, "downscale_factor": 4, "adapter_type": "full_adapter"}
    networks = [ready(T2IAdapter(**shape), seed) for seed in (0, 1)]
    pipe = StableDiffusionAdapterPipeline(**small_parts(unet=unet(**FEW), adapter=networks))
    return family(pipe, {**TEXT_CALL, **PICTURES, "adapter_conditioning_scale": [0.5, 0.6]})


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The decode_latents method is deprecated:FutureWarning")
@pytest.mark.parametrize(
    ("build", "component"),
    [(two_controls, "controlnet"), (two_adapters, "adapter")],
)
def test_they_are_those_that_diffusers_loads_and_rest_in_their_files(build, component, tmp_path):
    theirs = saved_and_loaded(build(), tmp_path)
    expected, call = run(theirs), theirs.call
    with pytest.raises(BudgetError) as refusal:
        lowtide.load(tmp_path, ram="10MB", native=False, **call)
    least = refusal.value.minimum.ram
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # none is loaded whole
        pipe = lowtide.load(tmp_path, ram=least, native=False, **call)
    pipe.set_progress_bar_config(disable=True)
    assert (run(replace(theirs, pipeline=pipe)) - expected).abs().max() <= ROWS
    rests = [weight.rest for weight in attachment_of(modules_of(pipe)[component]).weights]
    folders = {rest.origin.file.path.parent.name for rest in rests if isinstance(rest, DiskRest)}
    assert folders == {component, f"{component}_1"}
    lowtide.fit(theirs.pipeline, ram=least + 10**7, disk=0, **call)  # no room for a second copy
    assert (run(theirs) - expected).abs().max() <= ROWS
    lowtide.unfit(theirs.pipeline)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    target = tmp_path_factory.mktemp("controls")
    two_controls().pipeline.save_pretrained(target)
    return target


def test_its_weights_are_those_of_both_folders(folder):
    part = GuestCheckpoint.opened(Source(str(folder)), {}).parts()["controlnet"]
    assert part.index is not None
    assert part.index.keys() == {name for name, _ in part.built.named_parameters()}
    for number, place in enumerate(("controlnet", "controlnet_1")):
        assert part.index[f"nets.{number}.conv_in.weight"].file.parent == folder / place


@pytest.mark.parametrize(
    ("entry", "said"),
    [("MyNetwork", "neither diffusers nor transformers has"), (None, "does not name the class")],
)
def test_a_network_of_no_known_class_is_refused(folder, entry, said):
    file = folder / "controlnet_1" / "config.json"
    before = file.read_text()
    config = json.loads(before)
    file.write_text(json.dumps({**config, "_class_name": entry}))
    try:
        with pytest.raises(CheckpointError, match=said):
            lowtide.load(folder, ram="16GB", native=False)
    finally:
        file.write_text(before)


def test_another_of_them_changes_the_picture():
    """Negative control."""
    made_of = two_controls()
    before = run(made_of)
    ready(made_of.pipeline.controlnet.nets[1], seed=2)
    assert not torch.equal(run(made_of), before)
