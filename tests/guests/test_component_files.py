"""One component of a guest in a file of its own: of safetensors under any names, or packed as GGUF."""

import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.guests import original_names
from tests.guests.families import FAMILIES, run
from tests.guests.family import Family, modules_of
from tests.guests.guest_cases import WARNINGS
from tests.guests.single_file_cases import least, reading_no_weights

import lowtide
from lowtide.guests.doors import plan_of
from lowtide.weights.index import CheckpointError

diffusers = pytest.importorskip("diffusers")
gguf = pytest.importorskip("gguf")
pytestmark = [
    *WARNINGS,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.usefixtures("traced_once"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """FLUX.2 in a folder, its transformer beside it under its original names, as it is and packed."""
    family = FAMILIES["Flux2 Klein"]()
    target = tmp_path_factory.mktemp("flux")
    family.pipeline.save_pretrained(str(target / "model"))
    shutil.rmtree(target / "model" / "transformer")
    state = original_names.flux2_transformer(family.pipeline.transformer)
    config = target / "model" / "transformer"
    config.mkdir()
    family.pipeline.transformer.save_config(config)
    save_file({name: tensor.clone().contiguous() for name, tensor in state.items()}, target / "flux.safetensors")
    write_gguf(target / "flux.gguf", state)
    return target, family


def write_gguf(file, state, kind=gguf.GGMLQuantizationType.Q8_0):
    """Matrices whose rows can be packed are; the other weights are float32."""
    writer = gguf.GGUFWriter(file, "flux")
    for name, tensor in state.items():
        numbers = tensor.detach().numpy().astype(np.float32)
        is_packed = numbers.ndim == 2 and numbers.shape[1] % 32 == 0
        if is_packed:
            writer.add_tensor(name, gguf.quants.quantize(numbers, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, numbers)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def run_of(pipe, family):
    pipe.set_progress_bar_config(disable=True)
    return run(Family(pipe, family.call, family.blocks, family.result))


def packing(dtype):
    return diffusers.GGUFQuantizationConfig(compute_dtype=dtype)


def network_by_diffusers(target, family, file, **options):
    return type(family.pipeline.transformer).from_single_file(
        str(file), config=str(target / "model"), subfolder="transformer", **options
    )


def by_diffusers(target, family, file, **options):
    """What diffusers makes with the transformer that it reads from a file, its weights copied."""
    network = network_by_diffusers(target, family, file, **options)
    parts = {name: part for name, part in family.pipeline.components.items() if name != "transformer"}
    pipe = type(family.pipeline)(**parts, transformer=network)
    for part in modules_of(pipe).values():
        for weight in part.parameters():
            if not hasattr(weight, "quant_type"):
                weight.data = weight.data.clone()
    return run_of(pipe, family)


@pytest.mark.slow
def test_a_component_in_a_file_under_its_original_names(folder):
    target, family = folder
    file = target / "flux.safetensors"
    expected = by_diffusers(target, family, file)
    smallest = least(target / "model", family.call, transformer=file)
    for ram in (smallest, "16GB"):
        pipe = lowtide.load(target / "model", ram=ram, transformer=str(file), **family.call)
        assert torch.equal(run_of(pipe, family), expected)


def test_the_file_of_a_pipeline_may_hold_one_component_of_it(folder):
    target, family = folder
    file = target / "flux.safetensors"
    pipe = lowtide.load(file, ram="16GB", config=target / "model", **family.call)
    assert torch.equal(run_of(pipe, family), by_diffusers(target, family, file))


@pytest.mark.parametrize("is_least", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["least", "plenty"])
def test_a_packed_component_stays_resident_and_the_others_stream(folder, is_least):
    target, family = folder
    file, options = target / "flux.gguf", {"quantization_config": packing(torch.float32)}
    expected = by_diffusers(target, family, file, torch_dtype=torch.float32, **options)
    with reading_no_weights():
        smallest = least(target / "model", family.call, transformer=file, dtype=torch.float32)
    for ram in (smallest,) if is_least else ("16GB",):
        pipe = lowtide.load(target / "model", ram=ram, transformer=file, dtype=torch.float32, **family.call)
        assert torch.equal(run_of(pipe, family), expected)
        planned = plan_of(pipe).components
        assert planned["transformer"].rule is None
        assert (planned["text_encoder"].rule is not None) == (ram == smallest)
        assert planned["transformer"].nbytes < 0.6 * (target / "flux.safetensors").stat().st_size


@pytest.mark.slow
def test_a_packed_component_computes_in_the_dtype_that_is_asked_for(folder):
    target, family = folder
    theirs = network_by_diffusers(
        target, family, target / "flux.gguf", torch_dtype=torch.bfloat16, quantization_config=packing(torch.bfloat16)
    )
    pipe = lowtide.load(
        target / "model", ram="16GB", transformer=target / "flux.gguf", dtype=torch.bfloat16, **family.call
    )
    run_of(pipe, family)
    ours = dict(pipe.transformer.named_parameters())
    assert sum(hasattr(weight, "quant_type") for weight in ours.values()) > 10
    for name, weight in theirs.named_parameters():
        assert type(ours[name]) is type(weight)
        assert ours[name].dtype == weight.dtype
        assert torch.equal(ours[name], weight)


def test_a_component_that_diffusers_read_from_gguf_is_taken_as_it_is(folder):
    target, family = folder
    network = network_by_diffusers(target, family, target / "flux.gguf", quantization_config=packing(torch.float32))
    pipe = lowtide.load(target / "model", ram="16GB", transformer=network, **family.call)
    assert pipe.transformer is network
    assert plan_of(pipe).components["transformer"].rule is None


def test_files_that_are_refused(folder, tmp_path):
    target, family = folder
    model = target / "model"
    state = load_file(target / "flux.safetensors")
    wrong = {
        "lacking.safetensors": {name: value for name, value in state.items() if name != "img_in.weight"},
        "other.safetensors": {"something": torch.zeros(3)},
        "scaled.safetensors": {**state, "img_in.scale_weight": torch.ones(1)},
        "wide.safetensors": {**state, "img_in.weight": torch.zeros(3, 3)},
    }
    for name, content in wrong.items():
        save_file(content, tmp_path / name)
    for name, said in (
        ("lacking.safetensors", "x_embedder.weight of its Flux2Transformer2DModel is not there"),
        ("other.safetensors", "none of its weights is in"),
        ("scaled.safetensors", "scale of weights in 8 bits"),
        ("wide.safetensors", "x_embedder.weight has the shape"),
        ("pickled.ckpt", "is pickled"),
        ("weights.npz", "are read from .safetensors and .gguf files"),
    ):
        with pytest.raises(CheckpointError, match=said):
            lowtide.load(model, ram="16GB", transformer=tmp_path / name, **family.call)
    with pytest.raises(FileNotFoundError, match="there is no such file"):
        lowtide.load(model, ram="16GB", transformer="nowhere.safetensors", **family.call)
    with pytest.raises(CheckpointError, match="Qwen3ForCausalLM is of transformers"):
        lowtide.load(model, ram="16GB", text_encoder=target / "flux.gguf", **family.call)
    with pytest.raises(ValueError, match="a GGUF file holds one component"):
        lowtide.load(target / "flux.gguf", ram="16GB")
    with pytest.raises(FileNotFoundError, match=r"transformer.*Give its weights or the network"):
        lowtide.load(tmp_path / "other.safetensors", ram="16GB", config=model, **family.call)
