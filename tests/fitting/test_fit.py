"""Pipelines within budgets: planned before they load, within their plans, as fast as allowed, and undone again."""

import copy
import json
import shutil
from dataclasses import replace

import pytest
import torch
from tests import tiny
from tests.fitting import fits
from tests.fitting.fits import bare_machine, traced_once  # noqa: F401
from tests.thinned import only

import lowtide
from lowtide.casting.cast_leaf import leaves
from lowtide.casting.cast_weight import small_of
from lowtide.fitting import applied_plan
from lowtide.memory.attach import attachment_of
from lowtide.memory.bounds import aligned
from lowtide.planning.options import component_options
from lowtide.planning.plan import BudgetError, Plan
from lowtide.weights.slots import slots

KINDS = ("pictures", "clips")
pytestmark = pytest.mark.usefixtures("bare_machine", "traced_once")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {kind: fits.checkpoint(tmp_path_factory.mktemp(kind), kind) for kind in KINDS}


@pytest.fixture(scope="module")
def plain(folders):
    return {kind: fits.make(fits.load(folders[kind], kind)) for kind in KINDS}


@pytest.mark.parametrize("shares", [(0.0, 0.2, 1.0), pytest.param((0.0, 0.05, 0.5, 1.0), marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", KINDS)
def test_every_budget_from_the_least_on_gives_the_same(folders, plain, kind, shares):
    pipe = fits.load(folders[kind], kind)
    whole = pipe.fit(ram="1GB", output="pt", pictures=2 if kind == "pictures" else 1)
    least = fits.least(pipe, output="pt", pictures=2 if kind == "pictures" else 1)
    seen = set()
    for share in shares:
        budget = int(least + share * (whole.peak - least))
        plan = pipe.fit(ram=budget, output="pt", pictures=2 if kind == "pictures" else 1)
        seen.add(str(plan.components))
        assert plan.peak <= budget
        made = fits.make(pipe)
        assert torch.equal(made, plain[kind]) if plan.exactness == "equal bits" else fits.same(made, plain[kind])
        for name, module in pipe.modules().items():
            if (found := attachment_of(module)) is not None and plan.components.get(name) is not None:
                assert found.stream.ledger.peak <= found.bound <= plan.peak
    assert len(seen) > 1  # the budgets made a difference


@pytest.mark.parametrize("kind", only(KINDS, "pictures"))
def test_less_than_the_least_is_refused_with_the_least(folders, plain, kind):
    pipe = fits.load(folders[kind], kind)
    pipe.fit(ram="1GB", output="pt")
    least = fits.least(pipe, output="pt")
    before = pipe.plan
    with pytest.raises(BudgetError, match="fit") as caught:
        pipe.fit(ram=least - 1, output="pt")
    assert caught.value.minimum.ram == least
    assert str(caught.value).startswith(f"{caught.value.reason} Try ")
    assert pipe.plan is before
    pipe.fit(ram=least, output="pt")
    fits.make(pipe, **({"num_images_per_prompt": 1, "generator": None} if kind == "pictures" else {}))


@pytest.mark.parametrize("kind", only(KINDS, "clips"))
def test_loading_plans_before_it_reads(folders, plain, kind, monkeypatch):
    pipe = fits.load(folders[kind], kind, ram="1GB")
    least = fits.least(pipe)
    assert torch.equal(fits.make(pipe), plain[kind])
    small = fits.load(folders[kind], kind, ram=int(least * 1.02))
    assert any(attachment_of(module) is not None for module in small.modules().values())
    monkeypatch.setattr("lowtide.fitting.checkpoints.load_components", None)  # nothing may be read
    with pytest.raises(BudgetError):
        fits.load(folders[kind], kind, ram=1000)


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_configurations_are_traced_once(folders, kind, monkeypatch):
    fits.load(folders[kind], kind, ram="1GB")
    monkeypatch.setattr("lowtide.fitting.meta_subject.trace", None)  # nothing may be traced
    pipe = fits.load(folders[kind], kind, ram="1GB")
    with pytest.raises(TypeError):
        fits.load(folders[kind], kind, ram="1GB", torch_dtype=torch.bfloat16)
    with pytest.raises(TypeError):
        fits.load(folders[kind], kind, ram="1GB", vae=pipe.vae)


def test_configurations_that_do_not_belong_together_are_named(folders, tmp_path, monkeypatch):
    shutil.copytree(folders["pictures"], tmp_path / "model")
    file = tmp_path / "model" / "unet" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "cross_attention_dim": 56}))
    with pytest.raises(ValueError, match=r"model: These parts make no pipeline: .*cross_attention_dim"):
        fits.load(tmp_path / "model", "pictures", ram="1GB")
    monkeypatch.setattr("lowtide.pipelines.parts._check_equal", lambda *_: None)  # what the checks do not know
    with pytest.raises(ValueError, match="The unet cannot do what stage 'denoise' asks of it"):
        fits.load(tmp_path / "model", "pictures", ram="1GB")


def test_a_larger_call_is_planned_anew_and_refused_before_it_begins(folders):
    pipe = fits.load(folders["pictures"], "pictures")
    pipe.fit(ram="1GB", output="pt")
    least = fits.least(pipe, output="pt")
    small = pipe.fit(ram=int(least * 1.05))
    with pytest.raises(BudgetError):
        fits.make(pipe, height=128, width=128, num_images_per_prompt=4, generator=None)
    assert pipe.plan is small
    fits.make(pipe, num_images_per_prompt=1, generator=None)


def test_a_plan_is_printed_saved_loaded_and_put_to_work_again(folders, plain, tmp_path):
    pipe = fits.load(folders["pictures"], "pictures")
    pipe.fit(ram="1GB")
    plan = pipe.fit(ram=int(fits.least(pipe, pictures=2, output="pt") * 1.1), pictures=2)
    (tmp_path / "plan.json").write_text(plan.to_json())
    loaded = Plan.from_json((tmp_path / "plan.json").read_text())
    assert loaded == plan
    assert json.loads(plan.to_json())["stages"]
    assert "unet" in str(plan)
    other = fits.load(folders["pictures"], "pictures")
    other.apply_plan(loaded)
    assert other.plan == plan
    assert {n: getattr(attachment_of(m), "rule", None) for n, m in other.modules().items()} == {
        n: getattr(attachment_of(m), "rule", None) for n, m in pipe.modules().items()
    }
    assert fits.same(fits.make(other), plain["pictures"])


@pytest.mark.parametrize("text", ["{}", "[]", '{"components": 3}', '{"device": "cpu", "components": {}}'])
def test_other_json_is_no_plan(text):
    with pytest.raises(ValueError, match="not a plan"):
        Plan.from_json(text)


def test_a_plan_of_other_components_is_refused(folders):
    pictures, clips = (fits.load(folders[kind], kind) for kind in KINDS)
    plan = clips.fit(ram="1GB")
    with pytest.raises(ValueError, match="transformer"):
        pictures.apply_plan(plan)


def test_unfit_leaves_no_trace(folders, plain):
    pipe = fits.load(folders["pictures"], "pictures")
    pipe.enable_vae_slicing()
    pipe.fit(ram="1GB")
    pipe.fit(ram=fits.least(pipe))
    pipe.unfit()
    pipe.unfit()
    assert pipe.plan is None
    assert pipe.vae.use_slicing
    assert not any(attachment_of(module) for module in pipe.modules().values())
    pipe.disable_vae_slicing()
    assert torch.equal(fits.make(pipe), plain["pictures"])


def test_eight_bits_only_where_allowed(folders, plain):
    pipe = fits.load(folders["pictures"], "pictures")
    plan = pipe.fit(ram="1GB", allow=("int8",))
    assert plan.exactness == "equal bits"  # memory is plenty, and equal bits are as fast
    assert torch.equal(fits.make(pipe), plain["pictures"])
    pipe.unfit()


@pytest.mark.parametrize("casting", [pytest.param("int8", marks=pytest.mark.slow), "int4"])
def test_a_plan_of_few_bits_takes_what_it_says(tmp_path, casting):
    """Bytes of weights between calls are those planned, and the results those of weights that were cast by hand."""
    wide = tiny.unet(**{**fits.UNET, "block_out_channels": [32, 32]})
    folder = fits.checkpoint(tmp_path, "pictures", unet=wide)
    pipe = fits.load(folder, "pictures")
    plan = pipe.fit(ram="1GB", allow=(casting,))
    component = pipe.applied.fit.meta.workload(pipe.usual_size(), ()).components["unet"]
    options = component_options(component, fits.RATES, (casting,), scarce_host=False)
    chosen = next(option.plan for option in options if option.plan.casting)
    assert (chosen.rule, chosen.casting) == (None, casting)
    cast = replace(plan, components={**plan.components, "unet": chosen})
    pipe.apply_plan(cast)
    weights = [weight for leaf in leaves(pipe.unet) for weight in leaf.weights]
    others = [slot.tensor for slot in slots(pipe.unet) if small_of(slot.tensor) is None]
    scales = sum(weight.scale.nbytes for weight in weights if weight.scale is not None)
    held = sum(aligned(weight.nbytes) for weight in weights) + sum(aligned(tensor.nbytes) for tensor in others) + scales
    assert held == cast.components["unet"].kept
    by_hand, inputs = fits.load(folder, "pictures"), tiny.unet_inputs()
    by_hand.unet.enable_layerwise_casting(getattr(torch, casting))
    with torch.no_grad():
        assert torch.equal(pipe.unet(**inputs).sample, by_hand.unet(**inputs).sample)
    pipe.unfit()
    assert not leaves(pipe.unet)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"ram": "much"}, "4GB"),
        ({"ram": "180%"}, "100 %"),
        ({"ram": "-9999TB"}, "is free"),
        ({"allow": ("int3",)}, "int8"),
        ({"allow": "fp8"}, "fp8"),
        ({"heigth": 64}, "height"),
        ({"height": 33}, "multiple"),
        ({"pictures": 0}, "pictures"),
    ],
)
def test_what_is_not_possible_is_said(folders, options, said):
    pipe = fits.load(folders["pictures"], "pictures")
    with pytest.raises(ValueError, match=said):
        lowtide.fit(pipe, **{"ram": "1GB", **options})
    assert pipe.plan is None


def test_vram_without_a_gpu_is_said_to_have_no_effect(folders):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    pipe = fits.load(folders["pictures"], "pictures")
    with pytest.warns(UserWarning, match="no GPU"):
        lowtide.fit(pipe, vram="4GB", ram="1GB")


def test_a_budget_and_choices_by_hand_do_not_go_together(folders):
    for option in ({"offload": "leaf"}, {"casting": "int8"}):
        with pytest.raises(ValueError, match="budget"):
            fits.load(folders["pictures"], "pictures", ram="1GB", **option)
    pipe = fits.load(folders["pictures"], "pictures", casting="int8")
    with pytest.raises(ValueError, match="8 bits"):
        pipe.fit(ram="1GB")


@pytest.mark.parametrize(
    "change",
    [
        lambda pipe: pipe.to("cpu"),
        pytest.param(lambda pipe: pipe.enable_model_cpu_offload(), marks=pytest.mark.slow),
        lambda pipe: setattr(pipe, "unet", copy.deepcopy(pipe.unet)),
    ],
    ids=["moved", "offloaded by hand", "replaced"],
)
def test_the_plan_is_at_work_in_every_call(folders, plain, change):
    pipe = fits.load(folders["pictures"], "pictures")
    size = {"output": "pt", "pictures": 2, "steps": 3}
    pipe.fit(ram="1GB", **size)
    plan = pipe.fit(ram=fits.least(pipe, **size), **size)
    change(pipe)
    assert fits.same(fits.make(pipe), plain["pictures"])
    held = {name: getattr(attachment_of(module), "rule", None) for name, module in pipe.modules().items()}
    assert {rule.level for rule in held.values() if rule is not None} == {
        one.rule.level for one in plan.components.values() if one.rule is not None
    }
    assert all(held[name].level == one.rule.level for name, one in plan.components.items() if one.rule is not None)


def test_size_and_allow_without_a_budget_are_refused(folders):
    for option in ({"size": {"steps": 3}}, {"allow": ("int8",)}):
        with pytest.raises(ValueError, match="budget"):
            fits.load(folders["pictures"], "pictures", **option)


@pytest.mark.parametrize(
    ("changes", "said"),
    [({"dtype": "float16"}, "float16"), ({"made_for": {"side": 1}}, "side"), ({"allow": ("int3",)}, "int3")],
)
def test_a_plan_that_is_not_of_this_pipeline_is_refused(folders, changes, said):
    pipe = fits.load(folders["pictures"], "pictures")
    plan = replace(pipe.fit(ram="1GB"), **changes)
    pipe.unfit()
    with pytest.raises(ValueError, match=said):
        pipe.apply_plan(plan)
    assert pipe.plan is None


def test_a_pipeline_whose_weights_are_in_no_file(tmp_path):
    from tests import tiny

    pipe = tiny.pipeline(tmp_path)
    before = fits.make(pipe)
    pipe.fit(ram="1GB", pictures=2)
    pipe.fit(ram=int(fits.least(pipe, pictures=2, output="pt") * 1.01), pictures=2)
    assert fits.same(fits.make(pipe), before)
    pipe.unfit()
    assert torch.equal(fits.make(pipe), before)


def test_what_is_replaced_after_it_is_planned_for_anew(folders, plain):
    pipe = fits.load(folders["pictures"], "pictures")
    before = pipe.fit(ram="1GB", pictures=2)
    pipe.to(torch.float64)
    after = pipe.fit(ram="1GB", pictures=2)
    assert after.dtype == "float64"
    assert after.peak > 1.5 * before.peak
    pipe.unfit()
    pipe = fits.load(folders["pictures"], "pictures")
    pipe.fit(ram="1GB", pictures=2)
    pipe.unet = fits.load(folders["pictures"], "pictures").unet
    assert torch.equal(fits.make(pipe), plain["pictures"])


@pytest.mark.parametrize(
    "change",
    [
        lambda pipe: pipe.set_attention_backend("math"),
        pytest.param(lambda pipe: pipe.unet.to(memory_format=torch.channels_last), marks=pytest.mark.slow),
        pytest.param(lambda pipe: pipe.unet.enable_attention_slicing("max"), marks=pytest.mark.slow),
    ],
    ids=["attention", "channels last", "heads"],
)
def test_what_is_set_after_it_is_planned_for_anew(folders, plain, change):
    pipe = fits.load(folders["pictures"], "pictures")
    pipe.fit(ram="1GB", output="pt", pictures=2, steps=3)
    pipe.fit(ram=fits.least(pipe, output="pt", pictures=2, steps=3) + 300_000, output="pt", pictures=2, steps=3)
    before = pipe.applied.fit
    fits.make(pipe)
    assert pipe.applied.fit.meta is before.meta, "what a plan sets itself is nothing new"
    change(pipe)
    assert fits.same(fits.make(pipe), plain["pictures"])
    assert pipe.applied.fit.meta is not before.meta
    assert pipe.applied.fit.workload.stages != before.workload.stages


def test_a_setting_of_the_autoencoder_is_planned_for(folders):
    pipe = fits.load(folders["clips"], "clips")
    before = pipe.fit(ram="1GB", frames=17).stage("decode")
    pipe.vae.num_latent_frames_batch_size = 4
    assert pipe.fit(ram="1GB", frames=17).stage("decode").activations > before.activations
    pipe.vae.num_latent_frames_batch_size = 2
    fits.make(pipe, num_frames=17)
    assert pipe.plan.stage("decode").activations == before.activations  # noticed by a call, too


def test_a_first_fit_that_fails_midway_leaves_everything_as_it_was(folders, plain, monkeypatch):
    pipe = fits.load(folders["pictures"], "pictures")
    pipe.enable_vae_slicing()
    pipe.fit(ram="1GB")
    least = fits.least(pipe)
    pipe.unfit()
    done = []

    def put_under_some(*given):
        if len(done) == 2:
            raise OSError("the disk is full")
        done.append(applied_plan_put_under(*given))

    applied_plan_put_under = applied_plan.put_under
    monkeypatch.setattr(applied_plan, "put_under", put_under_some)
    with pytest.raises(OSError, match="full"):
        pipe.fit(ram=least)
    assert len(done) == 2
    assert pipe.plan is None
    assert pipe.vae.use_slicing
    assert not any(attachment_of(module) for module in pipe.modules().values())
    pipe.disable_vae_slicing()
    assert torch.equal(fits.make(pipe), plain["pictures"])


def test_weights_go_back_to_the_device_that_they_came_from(folders):
    pipe = fits.load(folders["pictures"], "pictures")
    pipe.fit(ram="1GB")
    moved = []
    pipe.applied.before = replace(pipe.applied.before, devices=dict.fromkeys(pipe.modules(), torch.device("meta")))
    pipe.unet.to = moved.append
    pipe.unfit()
    assert moved == [torch.device("meta")]
    assert pipe.vae.decoder.conv_in.weight.is_meta


def test_the_offload_of_before_comes_back(folders):
    pipe = fits.load(folders["pictures"], "pictures", offload="leaf", offload_device="cpu")
    rules = {name: attachment_of(module).rule for name, module in pipe.modules().items()}
    pipe.fit(ram="1GB")
    pipe.unfit()
    assert {name: attachment_of(module).rule for name, module in pipe.modules().items()} == rules


def test_a_budget_cannot_be_changed_during_a_call(folders):
    pipe = fits.load(folders["pictures"], "pictures")
    plan = pipe.fit(ram="1GB", pictures=2)

    def meddle(*_):
        with pytest.raises(RuntimeError, match="being called"):
            pipe.fit(ram="1GB")
        with pytest.raises(RuntimeError, match="being called"):
            pipe.unfit()
        with pytest.raises(RuntimeError, match="being called"):
            pipe.apply_plan(plan)
        return {}

    fits.make(pipe, callback_on_step_end=meddle)
    assert pipe.plan.components == plan.components


@pytest.mark.parametrize(
    "change",
    [
        {"device": "toaster"},
        {"allow": ["int3"]},
        {"budgets": {"vram": None, "ram": "1GB", "disk": None}},
        {"components": {"unet": {"rule": None, "casting": "int3"}}},
    ],
)
def test_a_plan_that_was_tampered_with_is_refused(folders, change):
    pipe = fits.load(folders["pictures"], "pictures")
    content = {**pipe.fit(ram="1GB").to_dict(), **change}
    with pytest.raises(ValueError, match=r"not a plan|not possible"):
        Plan.from_dict(content)


@pytest.mark.parametrize("size", [{"height": 8_000_000}, {"output": "foo"}, {"guided": "no"}])
def test_sizes_that_make_no_sense_are_refused_at_once(folders, size):
    pipe = fits.load(folders["pictures"], "pictures")
    with pytest.raises(ValueError, match="not possible"):
        pipe.fit(ram="1GB", **size)


def test_a_size_may_be_asked_for_by_the_arguments_of_a_call(folders):
    pipe = fits.load(folders["pictures"], "pictures")
    call = {"num_inference_steps": 3, "num_images_per_prompt": 2, "output_type": "pt", "guidance_scale": 1.0}
    plan = pipe.fit(ram="1GB", prompt=["a boat", "the sea"], **call)
    assert plan.made_for == {**plan.made_for, "steps": 3, "pictures": 4, "prompts": 2, "output": "pt", "guided": False}
    with pytest.raises(ValueError, match="num_inference_steps and steps are both given"):
        pipe.fit(ram="1GB", num_inference_steps=3, steps=3)
    clips = fits.load(folders["clips"], "clips")
    assert clips.fit(ram="1GB", num_frames=9).made_for["frames"] == 9
