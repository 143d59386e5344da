"""What scripts for the peer read, assign and load with: it takes effect, or is an error that says what there is."""

from __future__ import annotations

import inspect
import re

import pytest
import torch
from tests import tiny
from tests.parity import test_cogvideox_pipeline as clips
from tests.parity import test_pipeline as pictures
from torch import nn

from lowtide import AutoencoderKL, DiffusionPipeline, StableDiffusionPipeline, UNet2DConditionModel
from lowtide.peer_names import INSTEAD
from lowtide.pipelines.cogvideox import CogVideoXPipeline
from lowtide.schedulers import SCHEDULERS

diffusers = pytest.importorskip("diffusers")
pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),  # the peer's own
]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return pictures.pair(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module")
def films(tmp_path_factory):
    return clips.pair(tmp_path_factory.mktemp("clips"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    where = tmp_path_factory.mktemp("saved")
    tiny.pipeline(where / "words", checker=True).save_pretrained(where / "model")
    return where / "model"


# ---- assigned

IN_USE = {
    # components
    *("vae", "unet", "transformer", "text_encoder", "tokenizer", "scheduler", "safety_checker", "feature_extractor"),
    # compared in test_peer_calls.py, or used by every decode
    *("use_slicing", "use_tiling", "tile_sample_min_size", "tile_latent_min_size", "tile_overlap_factor"),
    *(f"tile_{part}_{side}" for part in ("sample_min", "latent_min", "overlap_factor") for side in ("height", "width")),
    *("num_latent_frames_batch_size", "num_sample_frames_batch_size", "ofs_embedding"),
    *("timesteps", "sigmas", "alphas_cumprod", "final_alpha_cumprod", "num_inference_steps", "_step_index"),
    "_begin_index",
    # what the run is told, see test_peer_calls.py
    *("_guidance_scale", "_guidance_rescale", "_interrupt"),
}
"""What a script may assign to ours, and has effect."""


def objects(pair, films):
    for ours, theirs in (pair, films):
        yield ours, theirs
        for name in ours.modules():
            if name != "text_encoder":
                yield getattr(ours, name), getattr(theirs, name)
    for name in SCHEDULERS:
        yield SCHEDULERS[name](), getattr(diffusers, name)()


def assignable(theirs):
    """The attributes of one of the peer's objects, and its properties."""
    plain = set(vars(nn.Module())) if isinstance(theirs, nn.Module) else set()
    properties = [name for name, value in inspect.getmembers(type(theirs)) if isinstance(value, property)]
    return sorted({*vars(theirs), *properties} - plain)


def refusal_of(ours, name):
    """What is said where a script assigns it; nothing where it can."""
    try:
        setattr(ours, name, None)
    except AttributeError as error:
        return str(error)
    return ""


def test_what_the_peer_lets_a_script_assign_has_effect_or_is_an_error(pair, films):
    for ours, theirs in objects(pair, films):
        for name in set(assignable(theirs)) - IN_USE:
            if name in ("guidance_scale", "guidance_rescale", "interrupt"):  # errors there, and of effect here
                continue
            assert re.search(f"{name}.*: .", refusal_of(ours, name)), (type(ours), name)


def test_own_attributes_of_scripts_can_be_assigned(pair):
    for part in (pair[0], pair[0].vae, pair[0].scheduler):
        part.my_note = "a script's own"
        assert part.my_note == "a script's own"
        del part.my_note


def test_entries_of_configurations_cannot_be_assigned(pair):
    for part in (pair[0], pair[0].vae, pair[0].unet, pair[0].scheduler):
        with pytest.raises(AttributeError, match="cannot"):
            part.config.anything = 1
        with pytest.raises(AttributeError, match=r"config cannot be assigned: build another"):
            part.config = {}


def test_every_name_is_an_error_with_a_way_on(pair):
    """Read, of a pipeline: none of them exists unnoticed, and all say what there is."""
    for name, instead in INSTEAD.items():
        if not hasattr(StableDiffusionPipeline, name):
            with pytest.raises(AttributeError, match=re.escape(instead)):
                getattr(pair[0], name)
    for name in ("load_lora_weights", "set_attn_processor"):
        assert not hasattr(pair[0].unet, name)
    with pytest.raises(AttributeError, match="'UNet2DConditionModel' object has no attribute 'blocks_of_tomorrow'"):
        _ = pair[0].unet.blocks_of_tomorrow


METHODS_OF_THE_PEER = ("enable_", "disable_", "set_", "load_", "unload_", "fuse_", "unfuse_")
OTHER_LIBRARIES = re.compile(r"lora|npu|xla|parallelism|_auto_class|set_use_")


def test_the_methods_of_the_peer_are_there_or_named(pair, films):
    for ours, theirs in (pair, films):
        public = [name for name in dir(type(theirs)) if name.startswith(METHODS_OF_THE_PEER)]
        absent = [name for name in public if not hasattr(ours, name) and not OTHER_LIBRARIES.search(name)]
        assert set(absent) <= set(INSTEAD)


# ---- configurations


def test_configurations_are_mappings_with_the_entries_of_the_peer(pair, films):
    for ours, theirs in objects(pair, films):
        mine, other = ours.config, dict(theirs.config)
        other.pop("_use_default_values", None)
        assert dict(mine) == dict(**mine) == {key: mine[key] for key in mine}
        assert len(mine) == len(dict(mine))
        own = ("image_encoder", "requires_safety_checker")
        if isinstance(ours, DiffusionPipeline):
            assert {key: value for key, value in other.items() if key not in own}.items() <= mine.items()
            continue
        missing = other.keys() - set(mine) - {"addition_embed_type_num_heads"}  # of a network that is not built
        assert missing <= {key for key in other if key in INSTEAD}, missing
        for key in other.keys() & set(mine):
            value = getattr(mine, key)
            assert mine.get(key) == mine[key]
            assert (list(value) if isinstance(value, tuple) else value) == mine[key]


def test_a_model_is_built_of_its_configuration_again(pair):
    for model, cls in ((pair[0].unet, UNet2DConditionModel), (pair[0].vae, AutoencoderKL)):
        assert cls.from_config(dict(model.config)).config == cls.from_config(model.config).config == model.config
        assert cls.from_config(model.config, sample_size=48).config.sample_size == 48


def test_an_unknown_entry_is_an_error(pair):
    with pytest.raises(AttributeError, match="UNet2DConditionConfig has no entry 'chanels'"):
        _ = pair[0].unet.config.chanels
    assert pair[0].unet.config.get("chanels", 3) == 3


# ---- loading

LOADED_ALIKE = {
    "torch_dtype": torch.float32,
    "dtype": {"default": torch.float32},
    "low_cpu_mem_usage": False,
    "device_map": "cpu",
    "use_safetensors": True,
    "variant": None,
    "revision": "main",
    "cache_dir": "elsewhere",
    "token": None,
    "local_files_only": True,
    "force_download": False,
    "trust_remote_code": True,
    "requires_safety_checker": False,
}
REFUSED_IN_LOADING = {
    "proxies": {"https": "x"},
    "custom_pipeline": "theirs",
    "custom_revision": "main",
    "provider": "CPU",
    "provider_options": {"a": 1},
    "sess_options": 1,
    "use_onnx": True,
    "use_flashpack": True,
    "disable_mmap": True,
    "max_memory": {0: "1GB"},
    "offload_folder": "there",
    "offload_state_dict": True,
    "quantization_config": object(),
    "load_connected_pipeline": True,
}


def arguments_of_loading():
    source = inspect.getsource(diffusers.DiffusionPipeline.from_pretrained)
    return set(re.findall(r'kwargs\.pop\("(\w+)"', source))


def test_every_argument_of_loading_is_taken_or_refused_by_name(folder):
    assert arguments_of_loading() == (LOADED_ALIKE.keys() | REFUSED_IN_LOADING.keys()) - {"requires_safety_checker"}
    expected = DiffusionPipeline.from_pretrained(folder).unet.state_dict()
    loaded = StableDiffusionPipeline.from_pretrained(
        folder, **dict.fromkeys(REFUSED_IN_LOADING), **{**LOADED_ALIKE, "dtype": None}
    )
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.unet.state_dict().items())
    assert loaded.config.requires_safety_checker is False
    for name, value in REFUSED_IN_LOADING.items():
        with pytest.raises(TypeError, match=rf"from_pretrained has no '{name}', which diffusers has: "):
            DiffusionPipeline.from_pretrained(folder, **{name: value})
    with pytest.raises(TypeError, match="max_memory"):
        UNet2DConditionModel.from_pretrained(folder, subfolder="unet", max_memory={0: 1})
    model = UNet2DConditionModel.from_pretrained(folder, subfolder="unet", low_cpu_mem_usage=False, device_map="cpu")
    assert model.device.type == "cpu"


def test_devices_that_are_asked_for(folder):
    placed = DiffusionPipeline.from_pretrained(folder, device_map="balanced")
    assert placed.device.type == ("cuda" if torch.cuda.is_available() else "cpu")
    with pytest.raises(ValueError, match="device for each network is not possible"):
        DiffusionPipeline.from_pretrained(folder, device_map={"unet": 0})
    with pytest.raises(ValueError, match="device_map and offload are not possible together"):
        DiffusionPipeline.from_pretrained(folder, device_map="cpu", offload="model")
    with pytest.raises(ValueError, match="device_map and ram are not possible together"):
        DiffusionPipeline.from_pretrained(folder, device_map="cpu", ram="1GB")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match=r"device='cuda' is not possible"):
            DiffusionPipeline.from_pretrained(folder, device_map="cuda")


def test_a_dtype_for_each_component(folder):
    """The picture of a U-Net in half precision, decoded in full precision: the peer's dtypes, and it decodes."""
    dtypes = {"default": torch.bfloat16, "vae": torch.float32}
    ours = DiffusionPipeline.from_pretrained(folder, torch_dtype=dtypes)
    theirs = diffusers.DiffusionPipeline.from_pretrained(folder, dtype=dtypes, safety_checker=None)
    for name in ("vae", "unet", "text_encoder"):
        assert getattr(ours, name).dtype == getattr(theirs, name).dtype, name
    ours.safety_checker = None
    ours.set_progress_bar_config(disable=True)
    call = {"num_inference_steps": 1, "height": 16, "width": 16, "output_type": "pt"}
    assert ours("a boat", **call).images.dtype == torch.float32
    with pytest.raises(ValueError, match=r"dtype has \['transformer'\]; the components are vae"):
        DiffusionPipeline.from_pretrained(folder, torch_dtype={"transformer": torch.float32})
    with pytest.raises(ValueError, match="a plan has one dtype"):
        DiffusionPipeline.from_pretrained(folder, torch_dtype=dtypes, ram="8GB")


# ---- pipelines from pipelines


def test_a_pipeline_from_a_pipeline(pair, films):
    ours = pair[0]
    again = StableDiffusionPipeline.from_pipe(ours)
    assert all(getattr(again, name) is part for name, part in ours.components.items() if name != "scheduler")
    other = StableDiffusionPipeline.from_pipe(ours, scheduler=tiny.scheduler("EulerDiscreteScheduler"))
    assert type(other.scheduler).__name__ == "EulerDiscreteScheduler"
    other.set_progress_bar_config(disable=True)
    built = StableDiffusionPipeline(**ours.components, requires_safety_checker=False, image_encoder=None)
    built.set_progress_bar_config(disable=True)
    assert pictures.worst(pictures.picture(built), pictures.picture(ours)) == 0
    assert pictures.worst(pictures.picture(other), pictures.picture(ours)) > pictures.TOLERANCE  # negative control
    with pytest.raises(ValueError, match=r"has no .*transformer: pass it in"):
        CogVideoXPipeline.from_pipe(ours)
    with pytest.raises(TypeError, match="custom_pipeline"):
        StableDiffusionPipeline.from_pipe(ours, custom_pipeline="x")
    with pytest.raises(TypeError, match=r"image_encoder.*adapters"):
        StableDiffusionPipeline(**ours.components, image_encoder=nn.Linear(1, 1))


# ---- progress


def test_the_keywords_of_the_peers_bar(pair, tmp_path):
    pipe = StableDiffusionPipeline.from_pipe(pair[0])
    with (tmp_path / "bar").open("w") as file:
        pipe.set_progress_bar_config(desc="boats", ncols=80, file=file)
        pictures.picture(pipe, num_inference_steps=1)
        assert "boats denoise" in (tmp_path / "bar").read_text()
        pipe.set_progress_bar_config(leave=False, file=file)
        before = len((tmp_path / "bar").read_text().split())
        pictures.picture(pipe, num_inference_steps=1)
    assert len((tmp_path / "bar").read_text().split()) == before
    pipe.set_progress_bar_config(disable=True, unit="it")
    pictures.picture(pipe, num_inference_steps=1)
    with pytest.raises(TypeError, match=r"takes no \['colours'\]"):
        pipe.set_progress_bar_config(colours="red")
