"""What people do to a guest within a budget: a LoRA loaded, weighted, fused and taken away; quantized networks."""

import pytest
import torch
from tests.guests.families import FAMILIES, run
from tests.guests.family import ready
from tests.guests.guest_cases import WARNINGS, least
from tests.memory_peaks import peak_bytes

from lowtide.guests.doors import fit, plan_of, unfit
from lowtide.guests.guest import Guest
from lowtide.guests.within_budget import guest_of
from lowtide.memory.attach import attachment_of

pytest.importorskip("diffusers")
pytestmark = [*WARNINGS, pytest.mark.filterwarnings("ignore:Already found a `peft_config`:UserWarning")]
KIND = {"SDXL": "unet", "Flux2 Klein": "transformer"}


def lora(pipe, part):
    """The weights of a LoRA for the projections of attention."""
    generator = torch.Generator().manual_seed(3)
    state = {}
    for name, module in getattr(pipe, part).named_modules():
        if isinstance(module, torch.nn.Linear) and any(kind in name for kind in ("to_q", "to_k", "to_v")):
            state[f"{part}.{name}.lora_A.weight"] = 0.3 * torch.randn(4, module.in_features, generator=generator)
            state[f"{part}.{name}.lora_B.weight"] = 0.3 * torch.randn(module.out_features, 4, generator=generator)
    return state


def in_turn(family, part):
    """Results: plain, with a LoRA, with half of it, fused, and without it again."""
    pipe = family.pipeline
    results = [run(family)]
    pipe.load_lora_weights(lora(pipe, part), adapter_name="one")
    results.append(run(family))
    pipe.set_adapters(["one"], [0.5])
    results.append(run(family))
    pipe.set_adapters(["one"], [1.0])
    pipe.fuse_lora()
    results.append(run(family))
    pipe.unfuse_lora()
    pipe.unload_lora_weights()
    return [*results, run(family)]


@pytest.mark.parametrize("name", [pytest.param("SDXL", marks=pytest.mark.slow), "Flux2 Klein"])
@pytest.mark.parametrize("is_least", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["least", "plenty"])
def test_a_lora_comes_and_goes(name, is_least):
    part, expected = KIND[name], in_turn(FAMILIES[name](), KIND[name])
    assert len({tuple(result.flatten().tolist()) for result in expected}) >= 4  # it makes a difference
    family = FAMILIES[name]()
    ram = least(family.pipeline, **family.call) + 200_000 if is_least else "16GB"
    fit(family.pipeline, ram=ram, **family.call)
    made = in_turn(family, part)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(made, expected, strict=True))
    assert (attachment_of(getattr(family.pipeline, part)) is not None) == is_least
    unfit(family.pipeline)
    assert torch.equal(run(family), expected[-1])


def several_in_turn(family):
    """Results: with two LoRAs, with one of them alone, with none, with both again, and after one was deleted."""
    pipe = family.pipeline
    one = lora(pipe, "transformer")
    pipe.load_lora_weights(dict(one), adapter_name="one")
    pipe.load_lora_weights({name: 0.5 * weight.flip(0) for name, weight in one.items()}, adapter_name="two")
    steps = [
        lambda: pipe.set_adapters(["one", "two"], [0.7, 0.4]),
        lambda: pipe.set_adapters("two"),
        pipe.disable_lora,
        pipe.enable_lora,
        lambda: pipe.set_adapters(["one", "two"]),
        lambda: pipe.delete_adapters("one"),
        lambda: pipe.transformer.set_adapters("two", 0.2),
    ]
    results = []
    for step in steps:
        step()
        results.append(run(family))
    return results


@pytest.mark.slow
def test_several_loras_are_chosen_disabled_and_deleted():
    family = FAMILIES["Flux2 Klein"]()
    expected = several_in_turn(family)
    assert len({tuple(result.flatten().tolist()) for result in expected}) >= 5
    family = FAMILIES["Flux2 Klein"]()
    fit(family.pipeline, ram=least(family.pipeline, **family.call) + 300_000, **family.call)
    made = several_in_turn(family)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(made, expected, strict=True))
    attachment = attachment_of(family.pipeline.transformer)
    assert attachment is not None
    assert not any(".one." in weight.name for weight in attachment.weights)
    assert any(".two." in weight.name for weight in attachment.weights)
    unfit(family.pipeline)
    assert torch.equal(run(family), expected[-1])


@pytest.mark.usefixtures("traced_once")
def test_layers_of_a_lora_are_units_like_others():
    family = FAMILIES["Flux2 Klein"]()
    pipe, state = family.pipeline, lora(family.pipeline, "transformer")
    fit(pipe, ram=least(pipe, **family.call) + 200_000, **family.call)
    pipe.load_lora_weights(dict(state), adapter_name="one")
    run(family)
    weights = attachment_of(pipe.transformer).weights
    assert sum(".lora_" in weight.views[0].slot.name for weight in weights) == len(state)


def with_torchao(transformer):
    pytest.importorskip("torchao", reason="it is imported by all that imports transformers, so it is not installed")
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(transformer, Int8WeightOnlyConfig())


def with_gguf(transformer):
    import gguf
    from diffusers.quantizers.gguf.utils import GGUFLinear, GGUFParameter

    kind = gguf.GGMLQuantizationType.Q8_0
    for name, module in list(transformer.named_modules()):
        if isinstance(module, torch.nn.Linear) and module.in_features % 32 == 0:
            linear = GGUFLinear(module.in_features, module.out_features, module.bias is not None, torch.float32)
            packed = gguf.quants.quantize(module.weight.detach().numpy(), kind)
            linear.weight, linear.bias = GGUFParameter(torch.from_numpy(packed.copy()), quant_type=kind), module.bias
            owner, _, leaf = name.rpartition(".")
            setattr(transformer.get_submodule(owner), leaf, linear)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_what_unpacking_takes_is_foreseen():
    from diffusers import Flux2Transformer2DModel

    family = FAMILIES["Flux2 Klein"]()
    sizes = {**family.pipeline.transformer.config, "attention_head_dim": 32, "axes_dims_rope": (8,) * 4}
    family.pipeline.transformer = ready(Flux2Transformer2DModel.from_config(sizes, num_attention_heads=8))
    with_gguf(family.pipeline.transformer)
    guest = Guest(family.pipeline)
    workload = guest.on_meta(torch.device("cpu")).workload(guest.usual_size(**family.call))
    predicted = max(stage.ways["whole"].peak for stage in workload.stages)
    run(family)
    measured = peak_bytes(lambda: run(family))
    assert measured - 4096 <= predicted <= 1.05 * measured
    largest = max(weight.numel() * weight.itemsize for weight in family.pipeline.transformer.parameters())
    assert measured > 5 * largest  # of which most is what unpacking takes


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("quantize", [with_torchao, with_gguf])
@pytest.mark.usefixtures("traced_once")
def test_quantized_networks_stay_resident(quantize):
    family = FAMILIES["Flux2 Klein"]()
    quantize(family.pipeline.transformer)
    family.pipeline.transformer.requires_grad_(False)
    expected = run(family)
    for ram in (least(family.pipeline, **family.call), "16GB"):
        fit(family.pipeline, ram=ram, **family.call)
        assert torch.equal(run(family), expected)
        planned = plan_of(family.pipeline).components["transformer"]
        assert planned.rule is None
        dense = sum(weight.numel() * 4 for weight in FAMILIES["Flux2 Klein"]().pipeline.transformer.parameters())
        assert planned.nbytes < 0.9 * dense
    unfit(family.pipeline)


def test_a_lora_that_is_fused_is_planned_for_as_such():
    """Its layers compute less then."""
    family = FAMILIES["Flux2 Klein"]()
    pipe = family.pipeline
    pipe.load_lora_weights(lora(pipe, "transformer"), adapter_name="one")
    fit(pipe, ram="8GB", **family.call)
    meta = guest_of(pipe).applied.fit.meta
    assert meta.is_of(guest_of(pipe))
    pipe.fuse_lora()
    assert not meta.is_of(guest_of(pipe))
