"""Guests from a folder within a budget: planned before a weight is read, then the same as their own library loads."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.guests.families import FAMILIES, run
from tests.guests.family import modules_of, saved_and_loaded
from tests.guests.guest_cases import ROWS, WARNINGS, families, weights_of

import lowtide
from lowtide.guests.doors import plan_of, unfit
from lowtide.memory.attach import attachment_of
from lowtide.memory.store import DiskRest
from lowtide.planning.plan import BudgetError
from lowtide.weights.fill import WeightsMismatchError
from lowtide.weights.index import CheckpointError

pytest.importorskip("diffusers")
pytestmark = [*WARNINGS, pytest.mark.usefixtures("traced_once")]


def smallest(folder, call, **options):
    with pytest.raises(BudgetError) as refusal:
        lowtide.load(folder, ram="10MB", native=False, **options, **call)
    return refusal.value.minimum.ram


@pytest.mark.parametrize("name", families("Flux2 Klein", "ZImage", "LTX"))
def test_the_same_as_its_own_library_loads(name, tmp_path):
    family = FAMILIES[name]()
    if family.not_saved:
        pytest.skip(family.not_saved)
    expected = run(saved_and_loaded(family, tmp_path))
    if "components" in name or not (tmp_path / "model_index.json").is_file():
        pytest.skip("a modular pipeline has no model_index.json")
    least = smallest(tmp_path, family.call)
    for ram in (least, least + weights_of(family.pipeline) // 2, "16GB"):
        loaded = type(family)(lowtide.load(tmp_path, ram=ram, native=False, **family.call), family.call, family.blocks,
            family.result)  # fmt: skip
        loaded.pipeline.set_progress_bar_config(disable=True)
        plan = plan_of(loaded.pipeline)
        made = run(loaded)
        assert plan_of(loaded.pipeline) is plan
        assert torch.equal(made, expected) if plan.exactness == "equal bits" else (made - expected).abs().max() <= ROWS


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    family = FAMILIES["Flux2 Klein"]()
    target = tmp_path_factory.mktemp("flux")
    family.pipeline.save_pretrained(str(target))
    return target, family


def test_weights_rest_in_the_files_that_they_came_from(folder):
    target, family = folder
    pipe = lowtide.load(target, ram=smallest(target, family.call), **family.call)
    streamed = [attachment for part in modules_of(pipe).values() if (attachment := attachment_of(part)) is not None]
    weights = [weight for attachment in streamed for weight in attachment.weights]
    rests = [weight.rest for weight in weights if weight.views[0].slot.kind == "parameter"]
    assert rests
    assert all(isinstance(rest, DiskRest) and rest.origin.file.path.is_relative_to(target) for rest in rests)


def test_a_pipeline_loaded_by_its_own_library_rests_in_its_files_too(folder):
    target, family = folder
    pipe = type(family.pipeline).from_pretrained(target)
    pipe.set_progress_bar_config(disable=True)
    plain = family.result(pipe(**family.call, generator=torch.Generator().manual_seed(0)))
    least = smallest(target, family.call)
    lowtide.fit(pipe, ram=least + 10**7, disk=0, **family.call)  # no room for a second copy
    made = family.result(pipe(**family.call, generator=torch.Generator().manual_seed(0)))
    unfit(pipe)
    assert torch.equal(made, plain)


@pytest.mark.parametrize("dtype", [torch.bfloat16, None], ids=["converted", "as in the files"])
def test_dtypes(folder, tmp_path, dtype):
    target, family = folder
    own = type(family.pipeline)
    if dtype is None:
        shutil.copytree(target, tmp_path / "halves")
        target = tmp_path / "halves"
        for file in target.glob("*/*.safetensors"):
            save_file(
                {name: x.bfloat16() if x.is_floating_point() else x for name, x in load_file(file).items()},
                file,
                {"format": "pt"},
            )
    expected = own.from_pretrained(target, dtype=torch.bfloat16)
    pipe = lowtide.load(target, ram="16GB", dtype=dtype, **family.call)
    for name, part in modules_of(expected).items():
        ours = modules_of(pipe)[name].state_dict()
        assert all(torch.equal(value, ours[key]) and value.dtype == ours[key].dtype
            for key, value in part.state_dict().items())  # fmt: skip
        buffers = dict(modules_of(pipe)[name].named_buffers())
        assert all(torch.equal(value, buffers[key]) for key, value in part.named_buffers())


def test_components_that_are_given_are_taken(folder):
    target, family = folder
    scheduler = type(family.pipeline.scheduler).from_config(family.pipeline.scheduler.config)
    pipe = lowtide.load(target, ram="16GB", vae=family.pipeline.vae, scheduler=scheduler, **family.call)
    assert pipe.vae is family.pipeline.vae
    assert pipe.scheduler is scheduler
    unfit(pipe)


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ({"transformer": ["my_code", "MyTransformer"]}, "neither diffusers nor transformers has"),
        ({"transformer": ["os", "system"]}, "neither diffusers nor transformers has"),
        ({"_class_name": "MyPipeline"}, "'MyPipeline', which diffusers .* does not have"),
        ({"_class_name": "AutoencoderKL"}, "'AutoencoderKL', which diffusers .* does not have"),
    ],
)
def test_code_of_others_is_never_run(folder, tmp_path, entry, said):
    shutil.copytree(folder[0], tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    index = tmp_path / "model" / "model_index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), **entry}))
    (tmp_path / "model" / "my_code.py").write_text("raise SystemExit('run')")
    with pytest.raises(CheckpointError, match=said):
        lowtide.load(tmp_path / "model", ram="16GB")


def test_weights_that_are_missing_are_an_error(folder, tmp_path):
    target, family = folder
    shutil.copytree(target, tmp_path / "model")
    file = next((tmp_path / "model" / "vae").glob("*.safetensors"))
    weights = load_file(file)
    name = next(name for name in weights if name.endswith("conv_out.weight"))
    save_file({(key if key != name else "elsewhere"): value for key, value in weights.items()}, file, {"format": "pt"})
    with pytest.raises(WeightsMismatchError, match=r"AutoencoderKLFlux2 and its weights .* do not match"):
        lowtide.load(tmp_path / "model", ram="16GB", **family.call)


def test_ours_is_ours_unless_told():
    shipped = lowtide.__path__[0] + "/assets/seascapes"
    pipe = lowtide.load(shipped, ram="2GB", height=64, width=64)
    assert isinstance(pipe, lowtide.StableDiffusionPipeline)
    assert plan_of(pipe).made_for["height"] == 64
    theirs = lowtide.load(shipped, ram="2GB", native=False, height=64, width=64, num_inference_steps=2)
    assert type(theirs).__mro__[1].__module__.startswith("diffusers")
