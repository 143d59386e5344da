"""Pipelines in single files within a budget: planned from headers and configurations, then what diffusers reads."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.guests.families import run
from tests.guests.family import modules_of
from tests.guests.guest_cases import ROWS, WARNINGS, weights_of
from tests.guests.single_file_cases import WHOLE, least, reading_no_weights, written

import lowtide
from lowtide.guests import conversions, single_files
from lowtide.guests.doors import plan_of, unfit
from lowtide.memory.attach import attachment_of
from lowtide.memory.store import DiskRest
from lowtide.weights.index import CheckpointError
from lowtide.weights.provenance import noted_origin

pytest.importorskip("diffusers")
pytestmark = WARNINGS
SLOW = ("StableDiffusion", "SDXL")


def made_from(folder, name):
    family, original = WHOLE[name]
    made = family()
    return written(made, original(made.pipeline), folder)


@pytest.fixture(scope="module", params=["SD3", *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def single(request, tmp_path_factory):
    """A pipeline in a file, and the least budget for it, which is found without reading a weight."""
    case = made_from(tmp_path_factory.mktemp("single"), request.param)
    with reading_no_weights():
        return case, least(case.file, case.family.call, config=case.config, native=False)


@pytest.fixture(scope="module")
def sd3(tmp_path_factory):
    return made_from(tmp_path_factory.mktemp("sd3"), "SD3")


def loaded(case, file=None, **options):
    pipe = lowtide.load(
        file or case.file, config=case.config, native=False, **{"ram": "16GB", **options}, **case.family.call
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def check(case, pipe, expected):
    by_rows = any(stage.way not in ("whole", "sliced") for stage in plan_of(pipe).stages)
    made = run(replace(case.family, pipeline=pipe))
    assert (made - expected).abs().max() <= ROWS if by_rows else torch.equal(made, expected)


def same_weights(theirs, pipe):
    for name, part in modules_of(theirs).items():
        ours = modules_of(pipe)[name].state_dict()
        for key, value in part.state_dict().items():
            assert torch.equal(value, ours[key]), (name, key)
            assert value.dtype == ours[key].dtype, (name, key)


def test_the_same_as_diffusers_reads_from_the_file_where_weights_rest(single):
    case, smallest = single
    theirs = case.by_diffusers()
    pipe = loaded(case, ram=smallest)
    assert type(pipe).__mro__[1] is type(case.family.pipeline)
    streamed = [attachment for part in modules_of(pipe).values() if (attachment := attachment_of(part)) is not None]
    rests = [weight.rest for attachment in streamed for weight in attachment.weights
        if weight.views[0].slot.kind == "parameter"]  # fmt: skip
    assert rests
    assert all(isinstance(rest, DiskRest) for rest in rests)
    elsewhere = [rest for rest in rests if rest.origin.file.path != case.file]
    assert len(elsewhere) <= 6  # halves that change places, and a matrix that is turned
    check(case, pipe, run(theirs))
    unfit(pipe)
    same_weights(theirs.pipeline, pipe)


@pytest.mark.slow
def test_more_budgets(single):
    case, smallest = single
    expected = run(case.by_diffusers())
    for ram in (smallest + weights_of(case.family.pipeline) // 2, "16GB"):
        check(case, loaded(case, ram=ram), expected)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, None], ids=["converted", "as in the file"])
def test_dtypes(single, tmp_path, dtype):
    case, _ = single
    file = case.file
    if dtype is None:
        file = tmp_path / "halves.safetensors"
        save_file({name: x.bfloat16() for name, x in load_file(case.file).items()}, file)
    expected = case.by_diffusers(torch_dtype=torch.bfloat16)
    pipe = loaded(case, file, dtype=dtype)
    same_weights(expected.pipeline, pipe)
    check(case, pipe, run(expected))


@pytest.mark.slow
def test_an_encoder_in_8_bits_computes_in_the_dtype_of_the_others(sd3, tmp_path):
    def small(name, x):
        return x.to(torch.float8_e4m3fn) if "t5xxl" in name else x.bfloat16()

    file = tmp_path / "whole.safetensors"
    save_file({name: small(name, x) for name, x in load_file(sd3.file).items()}, file)
    expected = run(replace(sd3, file=file).by_diffusers(torch_dtype=torch.bfloat16))
    smallest = least(file, sd3.family.call, config=sd3.config)
    for options in ({"dtype": torch.bfloat16}, {}, {"ram": smallest}):
        check(sd3, loaded(sd3, file, **options), expected)


@pytest.mark.slow
def test_what_cannot_be_followed_is_loaded_by_its_library(sd3, monkeypatch):
    def asks(checkpoint, config):
        return (
            convert(checkpoint) if bool((checkpoint["model.diffusion_model.x_embedder.proj.bias"] != 1).all()) else {}
        )

    table = pytest.importorskip("diffusers.loaders.single_file_model").SINGLE_FILE_LOADABLE_CLASSES
    convert = table["SD3Transformer2DModel"]["checkpoint_mapping_fn"]
    monkeypatch.setitem(table["SD3Transformer2DModel"], "checkpoint_mapping_fn", asks)
    expected = run(sd3.by_diffusers())
    with pytest.warns(UserWarning, match="transformer is loaded by its own library.*could not be followed"):
        pipe = loaded(sd3)
    check(sd3, pipe, expected)


def test_what_is_computed_needs_room_on_disk(sd3):
    with pytest.raises(ValueError, match=r"disk=0.0 kB is not enough: some weights of .*transformer.* are computed"):
        loaded(sd3, disk=0)


def test_configurations_that_cannot_be_fetched(sd3, tmp_path, monkeypatch):
    monkeypatch.setattr(single_files, "_published", lambda index: "nobody/nothing-of-this-name")
    with pytest.raises(FileNotFoundError, match=r"It looks like nobody/.* give config= .*, a folder or Hub id"):
        lowtide.load(sd3.file, ram="16GB", local_files_only=True)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        lowtide.load(sd3.file, ram="16GB", config=tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"config=.* is for a file"):
        lowtide.load(sd3.config, ram="16GB", config=sd3.config)


def test_kinds_are_told_by_names_and_shapes(sd3, tmp_path):
    known = {
        "model.diffusion_model.output_blocks.11.0.skip_connection.weight": "stable-diffusion-v1-5",
        "conditioner.embedders.1.model.transformer.resblocks.9.mlp.c_proj.bias": "stable-diffusion-xl-base-1.0",
        "double_blocks.0.img_attn.norm.key_norm.scale": "FLUX.1-schnell",
    }
    for name, published in known.items():
        save_file({name: torch.zeros(1)}, tmp_path / "w.safetensors")
        assert published in single_files._published(single_files.opened(tmp_path / "w.safetensors"))
    save_file({"something": torch.zeros(1)}, tmp_path / "w.safetensors")
    with pytest.raises(CheckpointError, match="of no pipeline that diffusers knows"):
        lowtide.load(tmp_path / "w.safetensors", ram="16GB")


def test_a_weight_that_is_missing_is_an_error(sd3, tmp_path):
    """Not taken from elsewhere without a word."""
    state = load_file(sd3.file)
    for name in ("model.diffusion_model.t_embedder.mlp.0.weight", "first_stage_model.decoder.conv_in.weight",
        "text_encoders.clip_g.transformer.text_model.final_layer_norm.weight"):  # fmt: skip
        file = tmp_path / "w.safetensors"
        save_file({key: value for key, value in state.items() if key != name}, file)
        with pytest.raises(CheckpointError, match=r"t_embedder|decoder.conv_in|final_layer_norm"):
            loaded(sd3, file)


def test_temporary_files_are_gone_once_a_pipeline_is_loaded(sd3, tmp_path, monkeypatch):
    monkeypatch.setattr(conversions.tempfile, "tempdir", str(tmp_path))
    pipe = loaded(sd3)
    assert not any(tmp_path.iterdir())
    origins = [noted_origin(part.get_parameter(name)) for part in modules_of(pipe).values()
        for name, _ in part.named_parameters()]  # fmt: skip
    assert any(origin.file.path.is_relative_to(tmp_path) for origin in origins)
