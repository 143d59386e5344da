"""A video pipeline's parts: saved and loaded, given, left out, replaced, or of another library."""

import functools
import json
import shutil

import pytest
import torch
from tests import tiny, tiny_video
from tests.thinned import thinned
from torch import nn

import lowtide
from lowtide.loading.components import load_components
from lowtide.pipelines.base import DiffusionPipeline
from lowtide.pipelines.cogvideox import CogVideoXPipeline
from lowtide.pipelines.stable_diffusion import StableDiffusionPipeline

NETWORKS = ("text_encoder", "vae", "transformer")


@pytest.fixture
def pipe(tmp_path):
    return tiny_video.pipeline(tmp_path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_video.write_checkpoint(tmp_path_factory.mktemp("models") / "model")


def film(pipe, **call):
    pipe.set_progress_bar_config(disable=True)
    size = {"height": 16, "width": 32, "max_sequence_length": tiny_video.MAX_TOKENS}
    defaults = {**size, "num_inference_steps": 2, "output_type": "pt"}
    return pipe("a panda", **{**defaults, "generator": tiny.seeded(2), **call}).frames


def same_networks(one, other):
    states = [(getattr(one, name).state_dict(), getattr(other, name).state_dict()) for name in NETWORKS]
    return all(a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a) for a, b in states)


CLASSES = [DiffusionPipeline, lowtide.CogVideoXPipeline]


@pytest.mark.parametrize(("kind", "cls"), thinned(tiny_video.TRANSFORMERS, CLASSES))
def test_a_saved_pipeline_is_loaded(tmp_path, cls, kind):
    pipe = tiny_video.pipeline(tmp_path / "words", kind)
    pipe.save_pretrained(tmp_path / "model", max_shard_size="30KB")
    loaded = cls.from_pretrained(tmp_path / "model")
    assert type(loaded) is CogVideoXPipeline
    assert same_networks(loaded, pipe)
    assert loaded.scheduler.config == pipe.scheduler.config
    assert type(loaded.scheduler) is type(pipe.scheduler)
    assert loaded.tokenizer("a red panda").input_ids == pipe.tokenizer("a red panda").input_ids
    assert tiny.difference(film(loaded), film(pipe)) < 1e-4
    loaded.transformer.proj_out.bias.add_(1)
    assert not same_networks(loaded, pipe)  # negative control


def test_the_folder_is_laid_out_as_published(folder):
    index = json.loads((folder / "model_index.json").read_text())
    assert index["_class_name"] == "CogVideoXPipeline"
    assert {key: value for key, value in index.items() if not key.startswith("_")} == {
        "tokenizer": ["transformers", "T5Tokenizer"],
        "text_encoder": ["transformers", "T5EncoderModel"],
        "vae": ["diffusers", "AutoencoderKLCogVideoX"],
        "transformer": ["diffusers", "CogVideoXTransformer3DModel"],
        "scheduler": ["diffusers", "CogVideoXDDIMScheduler"],
    }
    for name in ("transformer/diffusion_pytorch_model", "vae/diffusion_pytorch_model", "text_encoder/model"):
        assert (folder / f"{name}.safetensors").is_file()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtypes(folder, tmp_path, dtype):
    loaded = CogVideoXPipeline.from_pretrained(folder, torch_dtype=dtype)
    wide = [name for name, weight in loaded.text_encoder.named_parameters() if weight.dtype == torch.float32]
    assert all(name.endswith("wo.weight") for name in wide)
    assert bool(wide) == (dtype == torch.float16)
    assert loaded.vae.dtype == loaded.transformer.dtype == loaded.text_encoder.dtype == loaded.dtype == dtype
    loaded.save_pretrained(tmp_path / "half", variant="half")
    again = CogVideoXPipeline.from_pretrained(tmp_path / "half", variant="half", torch_dtype="auto")
    assert same_networks(again, loaded)
    assert torch.equal(film(again), film(loaded))


def test_parts_given_are_used_and_need_no_folder(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "model")
    shutil.rmtree(copy / "transformer")
    transformer, schedule = tiny_video.transformer(), tiny_video.scheduler("DPMSolverMultistepScheduler")
    loaded = CogVideoXPipeline.from_pretrained(copy, transformer=transformer, scheduler=schedule)
    assert loaded.transformer is transformer
    assert loaded.scheduler is schedule
    assert list(loaded.components) == ["tokenizer", "text_encoder", "vae", "transformer", "scheduler"]
    assert loaded.components["vae"] is loaded.vae
    assert film(loaded).isfinite().all()
    assert "transformer: CogVideoXTransformer3DModel" in repr(loaded)
    assert CogVideoXPipeline(**loaded.components).vae is loaded.vae


def test_text_can_be_encoded_beforehand(folder, tmp_path):
    """The largest network need not be loaded, nor saved."""
    whole = CogVideoXPipeline.from_pretrained(folder)
    with torch.no_grad():
        positive, negative = whole.encode_prompt("a panda", max_sequence_length=tiny_video.MAX_TOKENS)
    bare = CogVideoXPipeline.from_pretrained(folder, text_encoder=None, tokenizer=None)
    assert bare.modules().keys() == {"vae", "transformer"}
    call = {"num_inference_steps": 2, "height": 16, "width": 32, "output_type": "pt", "generator": tiny.seeded(2)}
    bare.set_progress_bar_config(disable=True)
    clip = bare(prompt_embeds=positive, negative_prompt_embeds=negative, **call).frames
    assert torch.equal(clip, film(whole))
    bare.save_pretrained(tmp_path / "bare")
    assert not (tmp_path / "bare" / "text_encoder").exists()
    with pytest.raises(ValueError, match="The checkpoint has no tokenizer, text_encoder: pass it in"):
        CogVideoXPipeline.from_pretrained(tmp_path / "bare")
    assert CogVideoXPipeline.from_pretrained(tmp_path / "bare", text_encoder=None, tokenizer=None).tokenizer is None


def test_the_wrong_pipeline_says_which_is_right(folder, tmp_path):
    with pytest.raises(ValueError, match="holds a CogVideoXPipeline, not a StableDiffusionPipeline: load it with that"):
        StableDiffusionPipeline.from_pretrained(folder)
    tiny.pipeline(tmp_path / "words").save_pretrained(tmp_path / "pictures")
    with pytest.raises(ValueError, match="holds a StableDiffusionPipeline, not a CogVideoXPipeline"):
        CogVideoXPipeline.from_pretrained(tmp_path / "pictures")

    class Own(CogVideoXPipeline):
        pass

    assert type(Own.from_pretrained(folder)) is Own


def test_files_are_fetched_that_are_published(folder):
    """Of a Hub's copy, by their patterns: the pieces, and weights of one variant."""

    class Watching:
        def fetch(self, patterns):
            self.patterns = list(patterns)
            return folder

    source = Watching()
    from lowtide.loading.components import LoadOptions
    from lowtide.loading.model_index import read_model_index

    _, specs, _ = read_model_index(folder)
    load_components(source, specs, LoadOptions(None))
    assert {"tokenizer/*.model", "text_encoder/model.safetensors", "scheduler/*.json"} <= set(source.patterns)
    assert "transformer/diffusion_pytorch_model.safetensors" in source.patterns


class Traced(nn.Module):
    """A stand-in for the transformer without a configuration; it answers with an object or a tuple."""

    def __init__(self, inner, as_tuple):
        super().__init__()
        self.inner = [inner]  # hidden from torch
        self.as_tuple = as_tuple

    def forward(self, hidden_states, encoder_hidden_states, timestep, image_rotary_emb=None):
        output = self.inner[0](hidden_states, encoder_hidden_states, timestep, image_rotary_emb=image_rotary_emb)
        return (output.sample,) if self.as_tuple else output


@pytest.mark.parametrize(("kind", "as_tuple"), thinned(tiny_video.TRANSFORMERS, [True, False]))
def test_a_replacement_needs_no_configuration(tmp_path, kind, as_tuple):
    pipe = tiny_video.pipeline(tmp_path, kind)
    expected = film(pipe)
    pipe.transformer = Traced(pipe.transformer, as_tuple)
    assert torch.equal(film(pipe), expected)
    assert "transformer: Traced" in repr(pipe)


def test_a_forward_that_returns_tuples(pipe):
    expected = film(pipe)
    pipe.transformer.forward = functools.partial(pipe.transformer.forward, return_dict=False)
    assert torch.equal(film(pipe), expected)


def test_an_autoencoder_of_another_library_needs_its_answers_only(pipe):
    """A configuration, how many latent frames it decodes at once, and `decode` with an answer that has `.sample`."""

    class Elsewhere(nn.Module):
        num_latent_frames_batch_size = 2

        def __init__(self, inner):
            super().__init__()
            self.inner, self.config = inner, inner.config

        def decode(self, z):
            return self.inner.decode(z)

    other = CogVideoXPipeline(**{**pipe.components, "vae": Elsewhere(pipe.vae)})
    assert torch.equal(film(other), film(pipe))
    assert len(film(other, output_type="pil")[0]) == 9


def test_embeddings_in_full_precision_serve_a_pipeline_in_half(pipe):
    pipe.to(torch.bfloat16)
    with torch.no_grad():
        positive, negative = pipe.encode_prompt("a panda", max_sequence_length=tiny_video.MAX_TOKENS)
    call = {"num_inference_steps": 1, "output_type": "latent", "max_sequence_length": tiny_video.MAX_TOKENS}
    embeds = {"prompt_embeds": positive.float(), "negative_prompt_embeds": negative.float()}
    clips = [pipe(**call, **which, generator=tiny.seeded(0)).frames for which in (embeds, {"prompt": "a panda"})]
    assert torch.equal(*clips)
