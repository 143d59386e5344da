"""Older key names reach the class at hand, whichever it is; anything else is left for `fill` to refuse."""

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from lowtide.weights.fill import WeightsMismatchError, fill, state_names
from lowtide.weights.index import read_index
from lowtide.weights.names import CLIP_TEXT_NAMES, SAFETY_CHECKER_NAMES, VAE_NAMES, NameTable, apply_names

LEGACY = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


class Attention(nn.Module):
    """The names of a VAE's mid-block attention."""

    def __init__(self):
        super().__init__()
        self.group_norm = nn.GroupNorm(2, 8)
        self.to_q, self.to_k, self.to_v = (nn.Linear(8, 8) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(8, 8), nn.Dropout(0.0)])


def vae():
    return nn.ModuleDict({"mid_block": nn.ModuleDict({"attentions": nn.ModuleList([Attention()])})})


def clip_text():
    transformers = pytest.importorskip("transformers")
    return transformers.CLIPTextModel(
        transformers.CLIPTextConfig(**TINY, vocab_size=20, bos_token_id=1, eos_token_id=2)
    )


def safety_checker():
    transformers = pytest.importorskip("transformers")
    checker = nn.Module()
    checker.vision_model = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**TINY, image_size=32))
    checker.visual_projection = nn.Linear(8, 4, bias=False)
    checker.register_buffer("concept_embeds", torch.ones(17, 4))
    return checker


TINY = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}


def legacy_vae_name(name):
    for new, old in LEGACY.items():
        name = name.replace(f".{new}.", f".{old}.")
    return name


def without(prefix):
    return lambda name: name.removeprefix(prefix)


def under(prefix, start=""):
    return lambda name: prefix + name if name.startswith(start) and not name.startswith(prefix + start) else name


def vision_unwrapped(name):
    return name.replace("vision_model.vision_model.", "vision_model.")


def vision_wrapped(name):
    return vision_unwrapped(name).replace("vision_model.", "vision_model.vision_model.")


def refill(build, table, rename, folder, change=lambda tensors: tensors):
    """Save a module's state under other names, fill a second one from it; return both states."""
    torch.manual_seed(0)
    original = build()
    tensors = {rename(name): tensor.clone() for name, tensor in original.state_dict().items()}
    save_file(change(tensors), folder / "x.safetensors")
    with torch.device("meta"):
        module = build()
    buffers = {name: tensor for name, tensor in original.named_buffers() if name not in original.state_dict()}
    index = apply_names(read_index(folder / "x.safetensors"), table, state_names(module))
    fill(module, index, buffers=buffers)
    return original.state_dict(), module.state_dict()


LAYOUTS = {
    "vae, legacy": (vae, VAE_NAMES, legacy_vae_name),
    "vae, today": (vae, VAE_NAMES, str),
    "text, wrapped": (clip_text, CLIP_TEXT_NAMES, under("text_model.")),
    "text, unwrapped": (clip_text, CLIP_TEXT_NAMES, without("text_model.")),
    "checker, wrapped twice": (safety_checker, SAFETY_CHECKER_NAMES, vision_wrapped),
    "checker, wrapped once": (safety_checker, SAFETY_CHECKER_NAMES, vision_unwrapped),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_published_layout_fills_the_class(tmp_path, layout):
    build, table, rename = LAYOUTS[layout]
    original, filled = refill(build, table, rename, tmp_path)
    assert original.keys() == filled.keys()
    assert all(torch.equal(filled[name], tensor) for name, tensor in original.items())


@pytest.mark.parametrize("kind", ["vae", "text", "checker"])
def test_one_of_two_layouts_needs_the_table(tmp_path, kind):
    layouts = [layout for name, layout in LAYOUTS.items() if name.startswith(kind)]
    assert sorted(fills_without_a_table(build, rename, tmp_path) for build, _, rename in layouts) == [False, True]


def fills_without_a_table(build, rename, folder):
    try:
        refill(build, NameTable(), rename, folder)
    except WeightsMismatchError:
        return False
    return True


def test_convolution_shaped_attention_is_read_as_linear(tmp_path):
    def as_convolutions(tensors):
        is_linear = {name for name in tensors if name.endswith(".weight") and tensors[name].dim() == 2}
        return {name: t[:, :, None, None].contiguous() if name in is_linear else t for name, t in tensors.items()}

    original, filled = refill(vae, VAE_NAMES, legacy_vae_name, tmp_path, as_convolutions)
    assert all(torch.equal(filled[name], tensor) for name, tensor in original.items())


@pytest.mark.parametrize(
    ("layout", "stray"),
    [
        ("text, wrapped", "text_model.embeddings.position_ids"),
        ("text, unwrapped", "embeddings.position_ids"),
        ("checker, wrapped twice", "vision_model.vision_model.embeddings.position_ids"),
    ],
)
def test_stray_position_ids_are_left_out(tmp_path, layout, stray):
    build, table, rename = LAYOUTS[layout]
    refill(build, table, rename, tmp_path, lambda tensors: {**tensors, stray: torch.arange(77)[None]})
    with pytest.raises(WeightsMismatchError, match="position_ids"):
        refill(build, NameTable(table.renames), rename, tmp_path, lambda tensors: {**tensors, stray: torch.ones(1)})


def test_other_keys_are_still_refused(tmp_path):
    with pytest.raises(WeightsMismatchError, match=r"text_model\.extra"):
        refill(
            clip_text, CLIP_TEXT_NAMES, str, tmp_path, lambda tensors: {**tensors, "text_model.extra": torch.ones(1)}
        )


def test_old_and_new_name_together_are_refused(tmp_path):
    def both(tensors):
        name = "mid_block.attentions.0.query.bias"
        return {**tensors, name: torch.ones(8)}

    with pytest.raises(WeightsMismatchError, match=r"0\.query\.bias \[8\]"):
        refill(vae, VAE_NAMES, str, tmp_path, both)


@pytest.mark.parametrize("kept", [["shared.weight"], ["encoder.embed_tokens.weight"], None])
def test_t5_needs_no_table(tmp_path, kept):
    transformers = pytest.importorskip("transformers")
    config = transformers.T5Config(d_model=8, d_ff=16, num_layers=1, num_heads=2, d_kv=4, vocab_size=20)
    ties = {"shared.weight", "encoder.embed_tokens.weight"}

    def build():
        return transformers.T5EncoderModel(config)

    def pruned(tensors):
        return {name: t for name, t in tensors.items() if kept is None or name not in ties or name in kept}

    original, filled = refill(build, NameTable(), str, tmp_path, pruned)
    assert all(torch.equal(filled[name], tensor) for name, tensor in original.items())
    assert filled["shared.weight"].data_ptr() == filled["encoder.embed_tokens.weight"].data_ptr()
