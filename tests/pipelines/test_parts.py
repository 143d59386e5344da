"""Parts that do not fit each other are refused from their configurations, before a weight is read."""

import json
import shutil

import pytest
import torch
from tests import tiny, tiny_video

import lowtide
from lowtide.activations.traced_call import NotByRowsError
from lowtide.hub import Source
from lowtide.loading import components
from lowtide.loading.model_index import CLASSES
from lowtide.models.tokenizers import TOKENIZERS
from lowtide.pipelines.base import DiffusionPipeline
from lowtide.pipelines.parts import CONFIGS, KINDS, UnfitPartsError, check_checkpoint
from lowtide.pipelines.stable_diffusion import StableDiffusionPipeline
from lowtide.schedulers import SCHEDULERS


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Checkpoints of both kinds, without any weights: nothing here may look for them."""
    folder = tmp_path_factory.mktemp("whole")
    tiny.pipeline(tmp_path_factory.mktemp("words"), checker=True).save_pretrained(folder / "pictures")
    tiny_video.write_checkpoint(folder / "clips")
    for file in folder.rglob("*.safetensors"):
        file.unlink()
    return folder


@pytest.fixture
def copies(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "copies")


def rewrite(file, **entries):
    file.write_text(json.dumps({**json.loads(file.read_text()), **entries}))


@pytest.mark.parametrize("kind", ["pictures", "clips"])
def test_what_fits(whole, kind):
    """Negative control."""
    names = {"pictures": "StableDiffusionPipeline", "clips": "CogVideoXPipeline"}
    assert check_checkpoint(Source(str(whole / kind))) == names[kind]


UNFIT = [
    ("pictures", "unet", {"in_channels": 9}, "an inpainting model.*in_channels=9, vae latent_channels=4"),
    ("pictures", "unet", {"in_channels": 8}, "edits pictures.*InstructPix2Pix"),
    ("pictures", "unet", {"in_channels": 5}, "a depth-to-picture model"),
    ("pictures", "unet", {"in_channels": 7}, "an upscaling model"),
    ("pictures", "unet", {"in_channels": 12}, "of different models"),
    ("pictures", "unet", {"out_channels": 8}, "unet has out_channels=8, and the vae has latent_channels=4"),
    (
        "pictures",
        "unet",
        {"cross_attention_dim": 32},
        "cross_attention_dim=32, and the text_encoder has hidden_size=24",
    ),
    ("pictures", "unet", {"addition_embed_type": "text_time"}, "an SDXL model"),
    ("pictures", "vae", {"latent_channels": 16}, "in_channels=4, vae latent_channels=16"),
    ("pictures", "vae", {"out_channels": 4}, "vae has out_channels=4, and pictures have 3"),
    ("pictures", "text_encoder", {"vocab_size": 100}, "token of number 517.*vocab_size=100"),
    ("pictures", "safety_checker", {"vision_config": {"image_size": 224}}, "crop_size.*image_size=224"),
    ("clips", "transformer", {"in_channels": 8}, "a picture-to-video model"),
    ("clips", "transformer", {"text_embed_dim": 32}, "text_embed_dim=32, and the text_encoder has d_model=16"),
    ("clips", "vae", {"latent_channels": 16}, "in_channels=4, and the vae has latent_channels=16"),
    ("clips", "text_encoder", {"vocab_size": 20}, "token of number 43.*vocab_size=20"),
]


@pytest.mark.parametrize(("kind", "part", "entries", "message"), UNFIT)
def test_parts_that_do_not_fit(copies, kind, part, entries, message):
    rewrite(copies / kind / part / "config.json", **entries)
    with pytest.raises(UnfitPartsError, match=message) as caught:
        check_checkpoint(Source(str(copies / kind)))
    assert str(caught.value).startswith(f"{copies / kind}: ")
    assert "Lowtide's own pipelines make pictures from text" in str(caught.value)


@pytest.mark.parametrize("load", ["pipeline", "plan"])
def test_loading_looks_at_the_parts_first(copies, load):
    """The folders hold no weights, and that is not what is said."""
    rewrite(copies / "pictures" / "unet" / "config.json", in_channels=9)
    budget = {"ram": "8GB"} if load == "plan" else {}
    with pytest.raises(UnfitPartsError, match="an inpainting model"):
        StableDiffusionPipeline.from_pretrained(copies / "pictures", **budget)
    with pytest.raises(FileNotFoundError, match="no 'diffusion_pytorch_model' weights"):
        StableDiffusionPipeline.from_pretrained(copies / "pictures", unet=tiny.unet())


def test_a_given_part_is_looked_at_too(copies):
    with pytest.raises(UnfitPartsError, match="an inpainting model"):
        StableDiffusionPipeline.from_pretrained(copies / "pictures", unet=tiny.unet(in_channels=9))


def test_parts_put_together_by_hand(tmp_path):
    with pytest.raises(UnfitPartsError, match="latent_channels=6"):
        tiny.pipeline(tmp_path, vae=tiny.vae("no quant convs"))
    with pytest.raises(UnfitPartsError, match="a picture-to-video model"):
        tiny_video.pipeline(tmp_path, transformer=tiny_video.transformer("5b", in_channels=8))


ASSIGNED = [
    ("unet", lambda: tiny.unet(in_channels=9), "an inpainting model.*in_channels=9, vae latent_channels=4"),
    ("vae", lambda: tiny.vae(latent_channels=16), "in_channels=4, vae latent_channels=16"),
]


@pytest.mark.parametrize("tiling", [False, "exact"])
@pytest.mark.parametrize(("name", "made", "message"), ASSIGNED, ids=["unet", "vae"])
def test_a_part_assigned_later_is_looked_at_before_any_work(tmp_path, name, made, message, tiling):
    """In the same words as one that is loaded; only in a call, since several may be assigned one after another."""
    pipe = tiny.pipeline(tmp_path)
    before, steps = getattr(pipe, name), []
    setattr(pipe, name, made())
    pipe.enable_vae_tiling(tiling)
    for call in (
        lambda: pipe("a", 16, 16, 1, callback_on_step_end=lambda *a: steps.append(1)),
        pipe.running().__enter__,
    ):
        with pytest.raises(UnfitPartsError, match=f"These parts make no pipeline: .*{message}"):
            call()
    assert steps == []
    setattr(pipe, name, before)
    pipe("a", 16, 16, 1, output_type="latent")


def test_a_part_of_a_clip_pipeline_assigned_later(tmp_path):
    pipe = tiny_video.pipeline(tmp_path)
    pipe.transformer = tiny_video.transformer("5b", in_channels=8)
    with pytest.raises(UnfitPartsError, match="a picture-to-video model"):
        pipe("a", num_inference_steps=1)


def test_parts_that_fit_each_other_may_be_assigned_one_after_another(tmp_path):
    pipe = tiny.pipeline(tmp_path)
    pipe.unet = tiny.unet(in_channels=6, out_channels=6)
    pipe.vae = tiny.vae("no quant convs")
    pipe("a", 16, 16, 1)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("StableDiffusionInpaintPipeline", "an inpainting model"),
        ("StableDiffusionXLPipeline", "an SDXL model"),
        ("StableDiffusionDepth2ImgPipeline", "a depth-to-picture model"),
        ("SomeOtherPipeline", "a SomeOtherPipeline"),
    ],
)
def test_another_kind_of_checkpoint_says_what_it_is(copies, name, said):
    rewrite(copies / "pictures" / "model_index.json", _class_name=name)
    with pytest.raises(ValueError, match=rf"is {said}.*own pipelines make pictures from text.*lowtide\.load\("):
        DiffusionPipeline.from_pretrained(copies / "pictures")
    assert check_checkpoint(Source(str(copies / "pictures")), "StableDiffusionPipeline") == name  # its parts fit
    rewrite(copies / "pictures" / "model_index.json", unet=[None, None])
    with pytest.raises(ValueError, match=f"is {said}.*has no unet"):
        StableDiffusionPipeline.from_pretrained(copies / "pictures")


def test_the_tables_name_the_classes_that_there_are():
    assert set(CLASSES) == {*components.MODELS, *SCHEDULERS, *TOKENIZERS, *components.IMAGE_PROCESSORS}
    assert set(CONFIGS) == {*components.MODELS}
    assert all(CONFIGS[name] is model.config_class for name, model in components.MODELS.items())
    assert all(getattr(lowtide, name).component_names == kind.components for name, kind in KINDS.items())


@pytest.mark.parametrize("kind", ["pictures", "clips"])
def test_autocast_with_exact_decoding_is_refused_before_any_step(tmp_path, kind):
    steps = []
    pipe = tiny.pipeline(tmp_path) if kind == "pictures" else tiny_video.pipeline(tmp_path, "2b")
    own = {} if kind == "pictures" else {"max_sequence_length": tiny_video.MAX_TOKENS, "num_frames": 1}

    def run(output):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            pipe("a", num_inference_steps=1, output_type=output, callback_on_step_end=lambda *a: steps.append(1), **own)

    pipe.enable_vae_tiling("exact")
    with pytest.raises(NotByRowsError, match=r"torch.autocast.*torch_dtype=torch.bfloat16"):
        run("pt")
    assert steps == []
    run("latent")
    pipe.disable_vae_tiling()
    run("pt")
    assert len(steps) == 2
