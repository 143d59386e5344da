"""Stable Diffusion (Rombach et al. 2022): prompt → tokens → embeddings → latents → denoise → decode → picture."""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch

from lowtide.fitting.resuming import resumed
from lowtide.fitting.subject import TracedStage
from lowtide.media.png import PictureFile
from lowtide.models.safety_checker import StableDiffusionSafetyChecker
from lowtide.models.unet_config import UNet2DConditionConfig
from lowtide.models.vae import AutoencoderKL
from lowtide.peer_names import refuse_arguments
from lowtide.pipelines import checks
from lowtide.pipelines.base import DiffusionPipeline
from lowtide.pipelines.callbacks import Callbacks, OldCallback, StepCallback
from lowtide.pipelines.clip_skip import check_clip_skip, skipping_layers
from lowtide.pipelines.decoding import check_decoding, decoding
from lowtide.pipelines.guidance import embeds_for, guided_noise
from lowtide.pipelines.latents import kept_safe, load_latents
from lowtide.pipelines.number_checks import check_count, check_guidance, check_rescale, check_steps
from lowtide.pipelines.parts import KINDS
from lowtide.pipelines.picture_files import OutputPath, picture_files, write_picture
from lowtide.pipelines.pipeline_outputs import StableDiffusionPipelineOutput, to_output, to_unit_range
from lowtide.pipelines.safety_check import checked
from lowtide.pipelines.traced_stages import picture_stages
from lowtide.planning.run_size import RunSize
from lowtide.schedulers import Generators, Scheduler, draw_noise

CALLBACK_TENSORS = ("latents", "prompt_embeds", "noise_pred", "negative_prompt_embeds")

SafetyChecker = StableDiffusionSafetyChecker | Callable[..., Any]
"""The published checker, or any callable; see `checked`."""


class StableDiffusionPipeline(DiffusionPipeline):
    """Text to pictures with Stable Diffusion 1.x and 2.x.

    Shapes: `B` pictures, `S` text tokens, `C` their width; latents `[B, 4, H/8, W/8]`. With guidance, embeddings are
    `[2B, S, C]`: the negative prompts, then the prompts. `unet` may be any callable module that takes latents, a
    timestep and embeddings in this order and returns an object with `.sample`, or a tuple.
    """

    component_names: ClassVar[tuple[str, ...]] = KINDS["StableDiffusionPipeline"].components
    optional_components: ClassVar[tuple[str, ...]] = KINDS["StableDiffusionPipeline"].optional
    setting_names: ClassVar[tuple[str, ...]] = ("requires_safety_checker",)

    def __init__(
        self,
        *,
        vae: AutoencoderKL,
        text_encoder: Any,
        tokenizer: Any,
        unet: Any,
        scheduler: Scheduler,
        safety_checker: SafetyChecker | None = None,
        feature_extractor: Any = None,
        image_encoder: None = None,
        requires_safety_checker: bool = True,
    ) -> None:
        super().__init__()
        refuse_arguments(type(self).__name__, {"image_encoder": image_encoder})
        if isinstance(safety_checker, StableDiffusionSafetyChecker) and feature_extractor is None:
            raise ValueError("safety_checker needs feature_extractor (a CLIPImageProcessor): give both or neither.")
        self.vae = vae
        self.text_encoder = text_encoder
        self.tokenizer = tokenizer
        self.unet = unet
        self.scheduler = _with_current_entries(scheduler)
        self.safety_checker = safety_checker
        self.feature_extractor = feature_extractor
        self.requires_safety_checker = requires_safety_checker
        self._unet_config: UNet2DConditionConfig = unet.config
        self.check_parts()

    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 50,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
        guidance_scale: float = 7.5,
        negative_prompt: str | Sequence[str] | None = None,
        num_images_per_prompt: int = 1,
        eta: float = 0.0,
        generator: Generators = None,
        latents: torch.Tensor | None = None,
        prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        cross_attention_kwargs: Mapping[str, Any] | None = None,
        guidance_rescale: float = 0.0,
        clip_skip: int | None = None,
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        callback: OldCallback | None = None,
        callback_steps: int | None = None,
        *,
        output_path: OutputPath | Sequence[OutputPath] | None = None,
        **others: Any,
    ) -> StableDiffusionPipelineOutput | tuple[Any, list[bool] | None]:
        """Make `num_images_per_prompt` pictures of each prompt, `height` x `width` pixels (default: the model's own).

        Guidance is on above a `guidance_scale` of 1 (Ho & Salimans 2022). A `generator` on the CPU draws the same noise
        for every device; a list gives each picture its own. `latents` `[B, 4, height/8, width/8]` is noise to start
        from, of unit variance. `timesteps` or `sigmas` replace `num_inference_steps` for schedulers that take them.
        `guidance_rescale` is a share of the guided prediction, see `guided_noise`; `clip_skip` leaves out so many of
        the text encoder's last layers, for the prompt alone. `callback_on_step_end(pipe, step, timestep, tensors)` may
        return changed tensors, and `callback(step, timestep, latents)` is told of every `callback_steps`-th step.
        `output_type="file"` writes PNG files as rows are decoded, so a picture may be larger than memory (with
        `enable_vae_tiling`): to `output_path`, numbered where there are several, or to new names in the current folder.
        Raises `ValueError` or `TypeError` for arguments that are not possible, before any work is done.
        """
        self.check_call(others)
        height, width = self.image_size(height, width)
        checks.check_prompt(prompt, prompt_embeds, ("prompt", "prompt_embeds"))
        negatives = ("negative_prompt", "negative_prompt_embeds")
        checks.check_prompt(negative_prompt, negative_prompt_embeds, negatives, needed=False)
        for embeds, name in ((prompt_embeds, "prompt_embeds"), (negative_prompt_embeds, "negative_prompt_embeds")):
            checks.check_width(embeds, name, self.unet_config.cross_attention_dim)
        checks.check_generator(generator)
        num_inference_steps = check_steps(num_inference_steps)
        num_images_per_prompt = check_count("num_images_per_prompt", num_images_per_prompt)
        guidance_scale = check_guidance(guidance_scale)
        guidance_rescale = check_rescale(guidance_rescale)
        check_clip_skip(self.text_encoder, clip_skip)
        checks.check_timesteps(self.scheduler, timesteps, sigmas)
        checks.check_attention_kwargs(cross_attention_kwargs, "cross_attention_kwargs")
        checks.check_output_type(output_type, output_path)
        inputs = callback_on_step_end_tensor_inputs
        steps = checks.count_steps(self.scheduler, num_inference_steps, timesteps, sigmas)
        callbacks = Callbacks.of(CALLBACK_TENSORS, callback_on_step_end, inputs, callback, callback_steps, steps=steps)
        if output_type != "latent":
            check_decoding(self.vae, self.latent_shape(1, height, width))
        prompts = checks.count_prompts(prompt, prompt_embeds)
        count = prompts * num_images_per_prompt
        if output_type == "file":
            picture_files(output_path, count)  # raises what it raises
        guided = guidance_scale > 1
        size = RunSize(height, width, count, prompts, steps, guided, output=output_type)
        with self.running(size):
            files = picture_files(output_path, count) if output_type == "file" else []  # names that are free by now
            self.begin(guidance_scale, guidance_rescale=guidance_rescale, clip_skip=clip_skip)
            with self.stages.stage("encode prompt"):
                embeds = self.encode_prompt(
                    prompt, num_images_per_prompt, guided, negative_prompt, prompt_embeds, negative_prompt_embeds,
                    clip_skip,
                )  # fmt: skip
            self.check_finite("encode prompt", embeds)
            self.lay_out_steps(num_inference_steps, timesteps, sigmas)
            x = self.prepare_latents(count, height, width, embeds, generator, latents)
            with self.stages.stage("denoise", steps=self.num_timesteps) as stage:
                for step, timestep in self.steps():
                    noise_pred = self.predict_noise(x, timestep, embeds, self.guidance_scale, self.guidance_rescale)
                    x = self.take_step(noise_pred, timestep, x, eta=eta, generator=generator)
                    x, embeds = callbacks.after_step(self, step, timestep, x, embeds, noise_pred=noise_pred)
                    stage.advance()
            images, unsafe = self.finish(x, output_type, files)
        return StableDiffusionPipelineOutput(images, unsafe) if return_dict else (images, unsafe)

    def finish(
        self, latents: torch.Tensor, output_type: str, files: Sequence[PictureFile] = (), saved: Path | None = None
    ) -> tuple[Any, list[bool] | None]:
        """Latents as the output type, and which pictures were unsafe.

        If decoding fails, latents are kept in a file; those of the file `saved` are there already.
        """
        self.check_finite("denoise", latents)
        if output_type == "latent":
            return latents, None
        with kept_safe(self, latents, saved):
            if output_type == "file":
                return self.write_pictures(latents, files)
            with decoding(self.stages, self.vae, len(latents)):
                pixels = self.decode_latents(latents)
            pixels, unsafe = self.run_safety_checker(pixels)
            return to_output(pixels, output_type), unsafe

    def decode_saved(
        self, path: str | os.PathLike[str], output_type: str = "pil", output_path: OutputPath | None = None
    ) -> StableDiffusionPipelineOutput:
        """Decode latents that were kept in a file when decoding them failed; the file stays.

        Raises `FileNotFoundError` and `ValueError` for files that hold no such latents.
        """
        checks.check_output_type(output_type, output_path)
        latents = load_latents(self, path)
        height, width = (side * self.vae_scale_factor for side in latents.shape[2:])
        with self.running(RunSize(height, width, len(latents), output=output_type)):
            files = picture_files(output_path, len(latents)) if output_type == "file" else []
            self.begin(self.guidance_scale)
            return StableDiffusionPipelineOutput(*self.finish(latents, output_type, files, Path(path)))

    @resumed("encode prompt")
    def encode_prompt(
        self,
        prompt: str | Sequence[str] | None,
        num_images_per_prompt: int = 1,
        do_classifier_free_guidance: bool = True,
        negative_prompt: str | Sequence[str] | None = None,
        prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        clip_skip: int | None = None,
    ) -> torch.Tensor:
        """Text to embeddings `[B, S, C]`, or `[2B, S, C]` with guidance: the negative ones first."""
        if prompt_embeds is None:
            assert prompt is not None
            with skipping_layers(self.text_encoder, clip_skip):
                prompt_embeds = self.embed([prompt] if isinstance(prompt, str) else list(prompt))
        batch = len(prompt_embeds)
        positive = prompt_embeds.to(self.device, getattr(self.unet, "dtype", self.text_encoder.dtype))
        positive = positive.repeat_interleave(num_images_per_prompt, dim=0)
        if not do_classifier_free_guidance:
            return positive
        if negative_prompt_embeds is None:
            texts = negative_prompt or ""
            negative_prompt_embeds = self.embed([texts] if isinstance(texts, str) else list(texts))
        checks.check_negatives(prompt_embeds.shape[:2], negative_prompt_embeds.shape[:2])
        negative = negative_prompt_embeds.to(positive).expand(batch, -1, -1)
        return torch.cat([negative.repeat_interleave(num_images_per_prompt, dim=0), positive])

    def embed(self, texts: list[str]) -> torch.Tensor:
        """The text encoder's last hidden states `[B, S, C]`, of texts padded and cut to the tokenizer's length."""
        length = self.tokenizer.model_max_length
        checks.warn_of_long_prompts(self.tokenizer, texts, length, own_tokens=2)
        tokens = self.tokenizer(texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        masked = getattr(self.text_encoder.config, "use_attention_mask", False)
        mask = tokens.attention_mask.to(self.device) if masked else None
        return self.text_encoder(tokens.input_ids.to(self.device), attention_mask=mask)[0]

    def prepare_latents(
        self,
        batch: int,
        height: int,
        width: int,
        embeds: torch.Tensor,
        generator: Generators = None,
        latents: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The noise to start from, `[batch, 4, height/8, width/8]`, with the scheduler's first standard deviation."""
        shape = self.latent_shape(batch, height, width)
        if latents is None:
            latents = draw_noise(shape, generator=generator, device=embeds.device, dtype=embeds.dtype)
        elif tuple(latents.shape) != shape:
            raise ValueError(f"latents {list(latents.shape)} do not fit: these pictures need {list(shape)}.")
        return latents.to(embeds) * self.scheduler.init_noise_sigma

    def latent_shape(self, batch: int, height: int, width: int) -> tuple[int, int, int, int]:
        """The shape of latents for pictures of this size in pixels."""
        scale = self.vae_scale_factor
        return batch, self.unet_config.in_channels, height // scale, width // scale

    @resumed("denoise")
    def predict_noise(
        self,
        latents: torch.Tensor,
        timestep: torch.Tensor,
        embeds: torch.Tensor,
        guidance_scale: float,
        guidance_rescale: float = 0.0,
    ) -> torch.Tensor:
        """One call of the U-Net; with guidance, ε = ε_negative + scale · (ε_prompt - ε_negative)."""
        guided = guidance_scale > 1
        embeds = embeds_for(embeds, latents, guided)
        model_input = self.scheduler.scale_model_input(torch.cat([latents] * 2) if guided else latents, timestep)
        output = self.unet(model_input, timestep, embeds)
        noise_pred = output.sample if hasattr(output, "sample") else output[0]
        if not guided:
            return noise_pred
        negative, positive = noise_pred.chunk(2)
        return guided_noise(negative, positive, guidance_scale, guidance_rescale)

    @resumed("decode")
    def decode_latents(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents to pictures `[B, 3, H, W]` in [0, 1]."""
        decoded: Any = self.vae.decode(self.in_dtype_of(self.vae, latents) / self.vae.config.scaling_factor)
        self.check_finite("decode", decoded.sample)
        return to_unit_range(decoded.sample)

    @resumed("decode")
    def write_pictures(
        self, latents: torch.Tensor, files: Sequence[PictureFile]
    ) -> tuple[list[Path], list[bool] | None]:
        """Decode latents `[B, 4, H/8, W/8]` straight into files, rows at a time."""
        height, width = (side * self.vae_scale_factor for side in latents.shape[2:])
        is_unsafe = None if self.safety_checker is None else lambda small: self.run_safety_checker(small)[1] == [True]
        unsafe: list[bool] = []
        with decoding(self.stages, self.vae, len(latents)):
            latents = self.in_dtype_of(self.vae, latents)
            for z, file in zip((latents / self.vae.config.scaling_factor).split(1), files, strict=True):
                produce = functools.partial(self.vae.decode_rows, z)
                look = functools.partial(self.check_finite, "decode")
                unsafe.append(write_picture(file, width, height, produce, is_unsafe, look))
        return [file.path for file in files], None if self.safety_checker is None else unsafe

    @resumed("safety check")
    def run_safety_checker(self, pixels: torch.Tensor) -> tuple[torch.Tensor, list[bool] | None]:
        """Have the safety checker, if there is one, look at pictures; see `checked`."""
        return checked(self, pixels)

    def image_size(self, height: int | None, width: int | None) -> tuple[int, int]:
        """Height and width in pixels, the model's own where None; raises `ValueError` for sizes it cannot make."""
        size = self.unet_config.sample_size or 64
        rows, columns = (size, size) if isinstance(size, int) else size
        height = rows * self.vae_scale_factor if height is None else height
        width = columns * self.vae_scale_factor if width is None else width
        return checks.check_size(height, width, self.vae_scale_factor)

    def usual_size(self, **asked: Any) -> RunSize:
        """The size of a run, the model's own where nothing is asked; raises `ValueError` as `checks.run_size` does."""
        height, width = self.image_size(asked.pop("height", None), asked.pop("width", None))
        return checks.run_size(height, width, **asked)

    def traced_stages(self, size: RunSize) -> Iterator[TracedStage]:
        """The stages of a run, for a pipeline on meta."""
        return picture_stages(self, size)

    @property
    def unet_config(self) -> UNet2DConditionConfig:
        """The U-Net's configuration; of a replacement that has none, the original's."""
        return getattr(self.unet, "config", self._unet_config)


def _with_current_entries(scheduler: Scheduler) -> Scheduler:
    """The scheduler without two entries of early checkpoints that Stable Diffusion was not trained with."""
    entries = scheduler.config.to_dict()
    corrections = {}
    if entries.get("clip_sample"):
        corrections["clip_sample"] = False
    if entries.get("timestep_spacing") == "leading" and entries.get("steps_offset") != 1:
        corrections["steps_offset"] = 1
    if not corrections:
        return scheduler
    changes = ", ".join(f"{key}={entries[key]} to {value}" for key, value in corrections.items())
    warnings.warn(
        f"The scheduler's configuration is outdated: it is changed from {changes}, as Stable Diffusion was trained. "
        "Correct its scheduler_config.json, or assign pipe.scheduler to keep it unchanged.",
        stacklevel=3,
    )
    return type(scheduler).from_config(scheduler.config.changed(corrections))
