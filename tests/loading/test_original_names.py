"""Original names: our table beside the conversions of diffusers, at the sizes that were published."""

from importlib import resources
from pathlib import Path

import pytest
import torch
from tests.loading.original_files import published_shapes

from lowtide.loading.original_names import Place
from lowtide.loading.original_weights import held_in, prefix_and_names
from lowtide.models.clip_text import CLIPTextModel
from lowtide.models.unet import UNet2DConditionModel
from lowtide.models.vae import AutoencoderKL
from lowtide.weights.gguf import GgufIndex, resting_index
from lowtide.weights.index import CheckpointIndex, TensorEntry

CLASSES = {"unet": UNet2DConditionModel, "vae": AutoencoderKL, "text_encoder": CLIPTextModel}
CONFIGS = Path(str(resources.files("lowtide"))) / "assets" / "published_configs"
FOLDERS = {"sd1": "stable_diffusion_1", "sd2": "stable_diffusion_2"}


def network_of(kind, part):
    folder = CONFIGS / FOLDERS[kind] / part
    config = CLASSES[part].read_config(folder)
    return config, CLASSES[part].on_meta(folder, config, None)


def laid_out(shapes):
    """An index of a file in half precision with these tensors, one behind the other."""
    entries, place = {}, 0
    for name, shape in shapes.items():
        nbytes = 2 * torch.Size(shape).numel()
        entries[name] = TensorEntry(Path("model.safetensors"), place, nbytes, torch.float16, shape)
        place += nbytes
    return CheckpointIndex(entries, (Path("model.safetensors"),), {})


def rows(number, shape, parts):
    """A tensor that takes no room and holds one number, plus a quarter in each further one of so many parts."""
    tensor = torch.full((shape[0],), number, dtype=torch.float16)
    tensor += torch.arange(parts).repeat_interleave(shape[0] // parts) / 4
    return tensor.view(-1, *[1] * (len(shape) - 1)).expand(shape)


def by_diffusers(kind, part, config, tensors):
    """What diffusers makes of the tensors of a file."""
    utils = pytest.importorskip("diffusers.loaders.single_file_utils")
    if part == "unet":
        return utils.convert_ldm_unet_checkpoint(dict(tensors), config.to_dict())
    if part == "vae":
        return utils.convert_ldm_vae_checkpoint(dict(tensors), config.to_dict())
    if kind == "sd1":
        return utils.convert_ldm_clip_checkpoint(dict(tensors))
    asked = type("Asked", (), {"config": config})
    return utils.convert_open_clip_checkpoint(asked, dict(tensors))


@pytest.mark.parity
@pytest.mark.parametrize("part", CLASSES)
@pytest.mark.parametrize("kind", FOLDERS)
def test_every_weight_is_the_one_that_diffusers_takes(kind, part):
    """Each tensor of the file holds a number of its own, by which it is known again."""
    shapes = published_shapes(kind)
    config, network = network_of(kind, part)
    index = laid_out(shapes)
    prefix, names = prefix_and_names(config, index)
    held = held_in(index, network, prefix, names)
    own = [name for name in shapes if name.startswith(prefix)]
    numbers = {name: float(number) for number, name in enumerate(own)}
    tensors = {name: rows(numbers[name], shapes[name], 3 if "in_proj" in name else 1) for name in own}
    theirs = by_diffusers(kind, part, config, tensors)
    theirs = {name.removeprefix("text_model."): tensor for name, tensor in theirs.items()}
    assert set(held.weights) == set(network.state_dict()) == set(theirs)
    for name, entry in held.weights.items():
        place, tensor = names.place(name), theirs[name]
        old = prefix + place.name
        assert entry.shape == tuple(network.get_parameter(name).shape) == tuple(tensor.shape[: len(entry.shape)])
        first, last = (float(tensor[(end,) * tensor.ndim]) for end in (0, -1))
        assert first == last == numbers[old] + (place.part / 4 if place.parts > 1 else 0), name
        assert entry.offset == index[old].offset + place.part * entry.nbytes
        assert entry.nbytes == 2 * torch.Size(entry.shape).numel()
    assert held.names == set(own)


def test_a_part_of_a_name_is_never_taken_for_a_whole_one():
    _, names = prefix_and_names(network_of("sd1", "unet")[0], laid_out(published_shapes("sd1")))
    assert names.place("up_blocks.1.resnets.1.conv1.weight") == Place("output_blocks.4.0.in_layers.2.weight")
    assert names.place("up_blocks.1.resnets.10.conv1.weight") == Place("up_blocks.1.resnets.10.conv1.weight")
    assert names.place("up_blocks.0.upsamplers.0.conv.bias") == Place("output_blocks.2.1.conv.bias")
    assert names.place("up_blocks.1.upsamplers.0.conv.bias") == Place("output_blocks.5.2.conv.bias")


def test_weights_in_blocks_are_shared_out_by_rows():
    """As stable-diffusion.cpp writes them: rows of blocks of 32 numbers in 18 bytes (Q4_0)."""
    config, network = network_of("sd2", "text_encoder")
    entries, kinds = {}, {}
    for name, shape in published_shapes("sd2").items():
        if name.startswith("cond_stage_model"):
            is_packed = len(shape) == 2 and "embedding" not in name
            packed = (*shape[:-1], shape[-1] // 32 * 18) if is_packed else shape
            dtype = torch.uint8 if is_packed else torch.float32
            nbytes = torch.Size(packed).numel() * dtype.itemsize
            entries[name] = TensorEntry(Path("model.gguf"), 4096, nbytes, dtype, packed)
            kinds |= {name: 2} if is_packed else {}
    index = resting_index(GgufIndex(entries, (Path("model.gguf"),), {}, kinds))
    weights = held_in(index, network, *prefix_and_names(config, index)).weights
    query, key, value = (weights[f"encoder.layers.3.self_attn.{name}_proj.weight"] for name in "qkv")
    assert query.shape == key.shape == value.shape == (1024, 1024 // 32, 18)
    assert (key.offset - query.offset, value.offset - key.offset) == (query.nbytes, query.nbytes)
