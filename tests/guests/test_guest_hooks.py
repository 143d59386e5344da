"""Hooks of users and of other libraries on a guest, put on before a budget and within it: they work, or are refused."""

from dataclasses import replace

import pytest
import torch
from tests.guests.families import FAMILIES, run
from tests.guests.guest_cases import WARNINGS, least

from lowtide.guests.doors import fit, plan_of, report, unfit
from lowtide.guests.ghost import ghost_of
from lowtide.memory.attach import attachment_of

pytest.importorskip("diffusers")
pytestmark = [*WARNINGS, pytest.mark.filterwarnings("ignore:.*experimental:UserWarning")]
CPU = torch.device("cpu")


def flux(**call):
    family = FAMILIES["Flux2 Klein"]()
    return replace(family, call={**family.call, **call})


def on_a_layer(transformer):
    def with_weight(module, args, result):
        return 0.9 * result + module.weight.sum()

    transformer.transformer_blocks[0].attn.to_q.register_forward_hook(with_weight)


def before_a_block(transformer):
    def softer(module, args, kwargs):
        return args, {**kwargs, "hidden_states": 0.9 * kwargs["hidden_states"]}

    transformer.transformer_blocks[1].register_forward_pre_hook(softer, with_kwargs=True)


def on_the_whole(transformer):
    transformer.register_forward_hook(lambda module, args, result: (0.9 * result[0], *result[1:]))


def by_another_forward(transformer):
    block = transformer.transformer_blocks[0]
    own = block.forward
    block.forward = lambda *args, **kwargs: tuple(0.9 * each for each in own(*args, **kwargs))


def by_accelerate(transformer):
    from accelerate.hooks import ModelHook, add_hook_to_module

    class Softer(ModelHook):
        def post_forward(self, module, result):
            return 0.9 * result

    add_hook_to_module(transformer.transformer_blocks[0].attn.to_q, Softer())


def cached(name, **about):
    def cache(transformer):
        from diffusers import hooks

        transformer.enable_cache(getattr(hooks, name)(**about))

    return cache


MAG = {"num_inference_steps": 4, "mag_ratios": [1.0] * 4, "retention_ratio": 0.1, "threshold": 0.5}
TAYLOR = {"cache_interval": 2, "disable_cache_before_step": 1, "max_order": 1}
HOOKS = {
    "a hook on a layer": (on_a_layer, "Flux2 Klein", 2),
    "a hook before a block": (before_a_block, "Flux2 Klein", 2),
    "a hook on the whole": (on_the_whole, "Flux2 Klein", 2),
    "another forward": (by_another_forward, "Flux2 Klein", 2),
    "a hook by accelerate": (by_accelerate, "Flux2 Klein", 2),
    "MagCache": (cached("MagCacheConfig", **MAG), "Flux2 Klein", 4),
    "TaylorSeerCache": (cached("TaylorSeerCacheConfig", **TAYLOR), "Flux2 Klein", 4),
}
IN_DEFAULT = ("a hook on a layer", "TaylorSeerCache")
CASES = [pytest.param(name, marks=() if name in IN_DEFAULT else pytest.mark.slow) for name in HOOKS]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("is_within", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["within", "before"])
def test_hooks_work_within_a_budget(name, is_within):
    put_on, kind, steps = HOOKS[name]
    family = FAMILIES[kind]()
    family = replace(family, call={**family.call, "num_inference_steps": steps})
    pipe, plain = family.pipeline, run(family)
    ram = least(pipe, **family.call) + (900_000 if "Cache" in name else 100_000)  # for what a cache keeps
    if is_within:
        fit(pipe, ram=ram, **family.call)
    put_on(pipe.transformer)
    if not is_within:
        fit(pipe, ram=ram, **family.call)
    made = [run(family), run(family)]
    assert plan_of(pipe).exactness == "equal bits"
    assert attachment_of(pipe.transformer) is not None or "Cache" in name
    unfit(pipe)
    expected = run(family)
    assert not torch.equal(expected, plain)
    assert all(torch.equal(each, expected) for each in made)


def test_a_copy_on_meta_goes_through_its_own_hooks():
    family = flux()
    cached("TaylorSeerCacheConfig", **TAYLOR)(family.pipeline.transformer)
    pairs = zip(family.pipeline.transformer.modules(), ghost_of(family.pipeline).transformer.modules(), strict=True)
    hooked = [(own, twin) for own, twin in pairs if getattr(own, "_diffusers_hook", None) and "forward" in vars(own)]
    assert hooked
    for own, twin in hooked:
        assert twin.forward.args[1] is twin
        assert twin.forward.args[0] in twin._diffusers_hook._fn_refs
        assert twin.forward.args[0] not in own._diffusers_hook._fn_refs


def offloaded(pipe):
    pipe.enable_model_cpu_offload(device="cpu")


def in_order(pipe):
    from accelerate import cpu_offload

    cpu_offload(pipe.transformer, CPU)


def in_groups(pipe):
    from diffusers.hooks import apply_group_offloading

    apply_group_offloading(pipe.text_encoder, onload_device=CPU, offload_type="leaf_level")


def in_eight_bits(pipe):
    from diffusers.hooks import apply_layerwise_casting

    apply_layerwise_casting(pipe.transformer, torch.float8_e4m3fn, torch.float32)


def with_broadcast(pipe):
    about = {"spatial_attention_block_skip_range": 2, "current_timestep_callback": lambda: pipe.current_timestep}
    cached("PyramidAttentionBroadcastConfig", **about)(pipe.transformer)


REFUSED = {
    "model offload": (offloaded, r"is under enable_model_cpu_offload already.*call pipe\.remove_all_hooks\(\) first"),
    "sequential": (in_order, r"transformer is under enable_sequential_cpu_offload.*pipe\.remove_all_hooks\(\) first"),
    "groups": (in_groups, "text_encoder is under enable_group_offload already.*load text_encoder anew without it"),
    "8 bits": (in_eight_bits, r"transformer is under enable_layerwise_casting already.*allow=\('fp8',\)"),
    "broadcast": (with_broadcast, r"current_timestep_callback asks .*call pipe\.transformer\.disable_cache\(\) first"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_hooks_that_move_weights_are_refused_before_anything_is_changed(name):
    put_on, told = REFUSED[name]
    pipe, call = (family := flux()).pipeline, family.call
    own = type(pipe)
    put_on(pipe)
    with pytest.raises(ValueError, match=told):
        fit(pipe, ram="16GB", **call)
    assert type(pipe) is own
    if name in ("model offload", "broadcast"):
        pipe.transformer.disable_cache() if name == "broadcast" else pipe.remove_all_hooks()
        fit(pipe, ram="16GB", **call)
        unfit(pipe)


@pytest.mark.parametrize("name", ["groups", "8 bits"])
def test_so_are_those_that_come_within_a_budget(name):
    family = flux()
    fit(family.pipeline, ram="16GB", **family.call)
    expected = run(family)
    refused = {"groups": ("enable_group_offload", (CPU,)), "8 bits": ("enable_layerwise_casting", ())}
    method, arguments = refused[name]
    with pytest.raises(RuntimeError, match=rf"transformer\.{method} and a budget are not possible together"):
        getattr(family.pipeline.transformer, method)(*arguments)
    assert torch.equal(run(family), expected)
    put_on, told = REFUSED[name]
    put_on(family.pipeline)
    with pytest.raises(ValueError, match=told):
        run(family)


@pytest.mark.filterwarnings("ignore:.*upcast_vae:FutureWarning", "ignore:float16 is slow on this processor")
def test_a_network_that_the_call_itself_converts_stays_a_stage():
    """SDXL in half precision decodes in float32, and converts its autoencoder for that."""
    family = FAMILIES["SDXL"]()
    pipe = family.pipeline.to(torch.float16)
    pipe.vae.register_to_config(force_upcast=True)
    plain = run(family)
    fit(pipe, ram=least(pipe, **family.call), **family.call)
    for _ in range(2):
        assert torch.equal(run(family), plain)
        assert [stage.name for stage in report(pipe).stages] == [stage.name for stage in plan_of(pipe).stages]
        assert pipe.vae.dtype == torch.float16
