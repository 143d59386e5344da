"""CogVideoX (Yang et al. 2024, arXiv 2408.06072): text to clips, in steps that can each be called alone."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch

from lowtide.activations.frame_cache import frame_batches, frames_made
from lowtide.fitting.resuming import resumed
from lowtide.fitting.subject import TracedStage
from lowtide.models.video_positions import rotary_embedding
from lowtide.pipelines import checks
from lowtide.pipelines.base import DiffusionPipeline
from lowtide.pipelines.callbacks import Callbacks, StepCallback
from lowtide.pipelines.decoding import check_decoding, decoding
from lowtide.pipelines.frames import Frames
from lowtide.pipelines.guidance import dynamic_guidance, guided_noise
from lowtide.pipelines.latents import kept_safe, load_latents
from lowtide.pipelines.number_checks import check_count, check_guidance, check_steps
from lowtide.pipelines.parts import KINDS
from lowtide.pipelines.pipeline_outputs import VIDEO_OUTPUT_TYPES, CogVideoXPipelineOutput
from lowtide.pipelines.traced_stages import clip_stages
from lowtide.planning.run_size import RunSize
from lowtide.schedulers import Generators, Scheduler, draw_noise

CALLBACK_TENSORS = ("latents", "prompt_embeds", "negative_prompt_embeds")
Rotary = tuple[torch.Tensor, torch.Tensor] | None
LatentShape = tuple[int, int, int, int, int]


class CogVideoXPipeline(DiffusionPipeline):
    """Text to clips with CogVideoX 2b, 5b and 1.5.

    Shapes: `B` clips, `S` text tokens, `C` their width; latents `[B, f, 16, H/8, W/8]` of `f` latent frames. With
    guidance, embeddings inside the loop are `[2B, S, C]`: the negative prompts, then the prompts. `transformer` may be
    any callable module that takes latents, embeddings and a timestep for each clip in this order, and
    `image_rotary_emb`, and returns an object with `.sample`, or a tuple. Without text encoder and tokenizer (None)
    calls need `prompt_embeds`, and with guidance `negative_prompt_embeds`.
    """

    component_names: ClassVar[tuple[str, ...]] = KINDS["CogVideoXPipeline"].components

    def __init__(self, *, tokenizer: Any, text_encoder: Any, vae: Any, transformer: Any, scheduler: Scheduler) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.text_encoder = text_encoder
        self.vae = vae
        self.transformer = transformer
        self.scheduler = scheduler
        self._transformer_config = transformer.config
        self.check_parts()

    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_frames: int | None = None,
        num_inference_steps: int = 50,
        timesteps: Sequence[int] | None = None,
        guidance_scale: float = 6.0,
        use_dynamic_cfg: bool = False,
        num_videos_per_prompt: int = 1,
        eta: float = 0.0,
        generator: Generators = None,
        latents: torch.Tensor | None = None,
        prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        attention_kwargs: Mapping[str, Any] | None = None,
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        max_sequence_length: int = 226,
        **others: Any,
    ) -> CogVideoXPipelineOutput | tuple[Any]:
        """Make `num_videos_per_prompt` clips of each prompt: `num_frames` of `height` x `width` pixels (None: usual).

        Guidance is on above a `guidance_scale` of 1 (Ho & Salimans 2022); with `use_dynamic_cfg` it changes from step
        to step, see `dynamic_guidance`. A `generator` on the CPU draws the same noise for every device; a list gives
        each clip its own. `latents`, of the shape that `latent_shape` gives, is noise to start from, of unit variance.
        `timesteps` replaces `num_inference_steps` for schedulers that take them. Prompts are padded and cut to
        `max_sequence_length` tokens. `callback_on_step_end(pipe, step, timestep, tensors)` may return changed tensors;
        `prompt_embeds` cut to those of the prompts, half of them, end the guidance.
        Frames come as "pil", "np", "pt" or "latent" (see `CogVideoXPipelineOutput`); where the model cannot make
        `num_frames`, a warning says how many there will be. Raises `ValueError` for arguments that are not possible,
        before any work is done.
        """
        self.check_call(others)
        height, width, num_frames = self.clip_size(height, width, num_frames)
        checks.check_attention_kwargs(attention_kwargs)
        checks.check_generator(generator)
        num_inference_steps = check_steps(num_inference_steps)
        num_videos_per_prompt = check_count("num_videos_per_prompt", num_videos_per_prompt)
        max_sequence_length = check_count("max_sequence_length", max_sequence_length)
        checks.check_timesteps(self.scheduler, timesteps)
        checks.check_output_type(output_type, possible=VIDEO_OUTPUT_TYPES)
        callbacks = Callbacks.of(CALLBACK_TENSORS, callback_on_step_end, callback_on_step_end_tensor_inputs)
        guidance_scale = check_guidance(guidance_scale)
        guided = guidance_scale > 1
        self.check_prompts(prompt, negative_prompt, guided, prompt_embeds, negative_prompt_embeds, max_sequence_length)
        batch = checks.count_prompts(prompt, prompt_embeds) * num_videos_per_prompt
        shape = self.latent_shape(batch, num_frames, height, width)
        checks.check_noise(shape, latents, generator)
        if output_type != "latent":
            self.check_clip(num_frames, height, width)
        rotary = self.rotary_positions(shape)
        prompts = checks.count_prompts(prompt, prompt_embeds)
        steps = checks.count_steps(self.scheduler, num_inference_steps, timesteps)
        size = RunSize(height, width, batch, prompts, steps, guided, num_frames, output_type)
        with self.running(size):
            self.begin(guidance_scale)
            with self.stages.stage("encode prompt"):
                positive, negative = self.encode_prompt(
                    prompt, negative_prompt, guided, num_videos_per_prompt,
                    prompt_embeds, negative_prompt_embeds, max_sequence_length,
                )  # fmt: skip
                embeds = positive if negative is None else torch.cat([negative, positive])
            self.check_finite("encode prompt", embeds)
            self.lay_out_steps(num_inference_steps, timesteps)
            x = self.prepare_latents(shape, embeds, generator, latents)
            with self.stages.stage("denoise", steps=self.num_timesteps) as stage:
                for step, timestep in self.steps():
                    if use_dynamic_cfg:
                        self.guidance_scale = dynamic_guidance(
                            guidance_scale, self.scheduler.number_of(timestep), steps
                        )
                    noise_pred = self.predict_noise(x, timestep, embeds, self.guidance_scale, rotary)
                    x = self.take_step(noise_pred, timestep, x, eta=eta, generator=generator)
                    x = x.to(embeds.dtype)
                    x, embeds = callbacks.after_step(self, step, timestep, x, embeds)
                    stage.advance()
            self.check_finite("denoise", x)
            frames: Any = x
            if output_type != "latent":
                x = x[:, self.padding(num_frames) :]
                with kept_safe(self, x):
                    frames = self.decode_latents(x, output_type)
        return CogVideoXPipelineOutput(frames) if return_dict else (frames,)

    def decode_saved(self, path: str | os.PathLike[str], output_type: str = "pil") -> CogVideoXPipelineOutput:
        """Decode latents that were kept in a file when decoding them failed; the file stays.

        Raises `FileNotFoundError` and `ValueError` for files that hold no such latents.
        """
        checks.check_output_type(output_type, possible=VIDEO_OUTPUT_TYPES)
        latents = load_latents(self, path)
        height, width = (side * self.vae_scale_factor for side in latents.shape[3:])
        frames = self._frames_of(latents.shape[1])
        size = RunSize(height, width, len(latents), frames=frames, output=output_type)
        with self.running(size), kept_safe(self, latents, Path(path)):
            self.begin(self.guidance_scale)
            self.check_finite("denoise", latents)
            return CogVideoXPipelineOutput(self.decode_latents(latents, output_type))

    @resumed("encode prompt")
    def encode_prompt(
        self,
        prompt: str | Sequence[str] | None,
        negative_prompt: str | Sequence[str] | None = None,
        do_classifier_free_guidance: bool = True,
        num_videos_per_prompt: int = 1,
        prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        max_sequence_length: int = 226,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Text to embeddings `[B, S, C]` of the prompts, and with guidance as many of the negative prompts."""
        if prompt_embeds is None:
            assert prompt is not None
            prompt_embeds = self.embed([prompt] if isinstance(prompt, str) else list(prompt), max_sequence_length)
        dtype = self.dtype if self.text_encoder is None else self.text_encoder.dtype
        positive = prompt_embeds.to(self.device, dtype)
        negative = None
        if do_classifier_free_guidance:
            if negative_prompt_embeds is None:
                texts = negative_prompt or ""
                negative_prompt_embeds = self.embed(
                    [texts] if isinstance(texts, str) else list(texts), max_sequence_length
                )
            negative = negative_prompt_embeds.to(positive).expand(len(positive), -1, -1)
            negative = negative.repeat_interleave(num_videos_per_prompt, dim=0)
        return positive.repeat_interleave(num_videos_per_prompt, dim=0), negative

    def embed(self, texts: list[str], length: int) -> torch.Tensor:
        """The text encoder's last hidden states `[B, S, C]`, of texts padded and cut to `length` tokens.

        Padding is not masked: the transformer was trained so.
        """
        checks.warn_of_long_prompts(self.tokenizer, texts, length, own_tokens=1)
        tokens = self.tokenizer(texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        return self.text_encoder(tokens.input_ids.to(self.device))[0]

    def prepare_latents(
        self,
        shape: LatentShape,
        embeds: torch.Tensor,
        generator: Generators = None,
        latents: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The noise to start from, of the scheduler's first deviation, with the device and dtype of `embeds`."""
        if latents is None:
            latents = draw_noise(shape, generator=generator, device=embeds.device, dtype=embeds.dtype)
        return latents.to(embeds) * self.scheduler.init_noise_sigma

    def rotary_positions(self, shape: LatentShape) -> Rotary:
        """Cosines and sines of the positions in latents, for models that are built for them (5b, 1.5)."""
        config = self.transformer_config
        if not config.use_rotary_positional_embeddings:
            return None
        _, frames, _, height, width = shape
        return rotary_embedding(config, height, width, frames, device=self.device)

    @resumed("denoise")
    def predict_noise(
        self,
        latents: torch.Tensor,
        timestep: torch.Tensor,
        embeds: torch.Tensor,
        guidance_scale: float,
        rotary: Rotary = None,
    ) -> torch.Tensor:
        """One call of the transformer, in float32; with embeddings `[2B, S, C]` guided: n + scale · (p - n)."""
        guided = len(embeds) == 2 * len(latents)
        model_input = self.scheduler.scale_model_input(torch.cat([latents] * 2) if guided else latents, timestep)
        output = self.transformer(model_input, embeds, timestep.expand(len(model_input)), image_rotary_emb=rotary)
        noise_pred = (output.sample if hasattr(output, "sample") else output[0]).float()
        if not guided:
            return noise_pred
        negative, positive = noise_pred.chunk(2)
        return guided_noise(negative, positive, guidance_scale)

    @resumed("decode")
    def decode_latents(self, latents: torch.Tensor, output_type: str = "pt") -> Any:
        """Latents `[B, f, C, h, w]` to frames as "pil", "np" or "pt", one clip after the other."""
        latents = self.in_dtype_of(self.vae, latents)
        batches = len(list(frame_batches(latents.shape[1], self._frames_at_once)))
        count = self._frames_of(latents.shape[1])
        frames = Frames(output_type, len(latents), count)
        with decoding(self.stages, self.vae, len(latents) * batches, len(latents) * count) as tell:
            for clip, x in enumerate(latents.split(1)):

                def take(first: int, decoded: torch.Tensor, clip: int = clip) -> None:
                    self.check_finite("decode", decoded)
                    frames.add(clip, first, decoded[0])
                    tell(decoded.shape[2])

                z_BCFHW = 1 / self.vae.config.scaling_factor * x.permute(0, 2, 1, 3, 4)
                if hasattr(self.vae, "decode_frames"):
                    self.vae.decode_frames(z_BCFHW, take)
                else:
                    take(0, self.vae.decode(z_BCFHW).sample)
        return frames.result

    def clip_size(self, height: int | None, width: int | None, num_frames: int | None) -> tuple[int, int, int]:
        """Height and width in pixels, and frames, the model's own where None; raises `ValueError` for impossible ones.

        Warns where the decoder makes another number of frames than is asked for.
        """
        config, scale = self.transformer_config, self.vae_scale_factor
        rows = config.sample_height * scale if height is None else height
        columns = config.sample_width * scale if width is None else width
        rows, columns = checks.check_size(rows, columns, scale * config.patch_size)
        frames = check_count("num_frames", config.sample_frames if num_frames is None else num_frames)
        checks.warn_of_other_frames(frames, self._frames_of(self._latent_frames(frames)))
        return rows, columns, frames

    def check_prompts(
        self,
        prompt: str | Sequence[str] | None,
        negative_prompt: str | Sequence[str] | None,
        guided: bool,
        prompt_embeds: torch.Tensor | None,
        negative_prompt_embeds: torch.Tensor | None,
        max_sequence_length: int,
    ) -> None:
        """Raise `ValueError` for texts or embeddings that are missing, too many, or of shapes that do not fit."""
        negatives = ("negative_prompt", "negative_prompt_embeds")
        checks.check_prompt(prompt, prompt_embeds, ("prompt", "prompt_embeds"))
        checks.check_prompt(negative_prompt, negative_prompt_embeds, negatives, needed=False)
        config = self.transformer_config
        fixed = None if config.use_rotary_positional_embeddings else config.max_text_seq_length
        given = {"prompt_embeds": prompt_embeds, "negative_prompt_embeds": negative_prompt_embeds}
        for name, embeds in given.items():
            checks.check_width(embeds, name, config.text_embed_dim, reader="the transformer", tokens=fixed)
        for name, embeds in given.items():
            if embeds is None and (guided or name == "prompt_embeds"):
                checks.check_text_parts(self.text_encoder, self.tokenizer, name)
                checks.check_text_length(max_sequence_length, fixed)
        if guided:
            tokens = [max_sequence_length if embeds is None else embeds.shape[1] for embeds in given.values()]
            is_given = negative_prompt is not None or negative_prompt_embeds is not None
            negative = checks.count_prompts(negative_prompt, negative_prompt_embeds) if is_given else 1
            checks.check_negatives((checks.count_prompts(prompt, prompt_embeds), tokens[0]), (negative, tokens[1]))

    def check_clip(self, num_frames: int, height: int, width: int) -> None:
        """Raise before any step what decoding a clip of this size would raise after all steps."""
        _, frames, channels, rows, columns = self.latent_shape(1, num_frames, height, width)
        check_decoding(self.vae, (1, channels, frames - self.padding(num_frames), rows, columns))

    def latent_shape(self, batch: int, num_frames: int, height: int, width: int) -> LatentShape:
        """The shape of latents for clips of this size, frames of padding included."""
        frames, scale = self._latent_frames(num_frames) + self.padding(num_frames), self.vae_scale_factor
        return batch, frames, self.transformer_config.in_channels, height // scale, width // scale

    def padding(self, num_frames: int) -> int:
        """Latent frames at the front that are denoised and dropped: version 1.5 takes `patch_size_t` frames at once."""
        at_once = getattr(self.transformer_config, "patch_size_t", None) or 1
        return -self._latent_frames(num_frames) % at_once

    def _latent_frames(self, num_frames: int) -> int:
        return (num_frames - 1) // int(self.vae.config.temporal_compression_ratio) + 1

    def _frames_of(self, latent_frames: int) -> int:
        return frames_made(latent_frames, self._frames_at_once, int(self.vae.config.temporal_compression_ratio))

    @property
    def _frames_at_once(self) -> int:
        return self.vae.num_latent_frames_batch_size

    def usual_size(self, **asked: Any) -> RunSize:
        """The size of a run, the model's own where nothing is asked; raises `ValueError` as `checks.run_size` does."""
        sides = asked.pop("height", None), asked.pop("width", None), asked.pop("frames", None)
        height, width, frames = self.clip_size(*sides)
        return checks.run_size(height, width, frames=frames, **asked)

    def traced_stages(self, size: RunSize) -> Iterator[TracedStage]:
        """The stages of a run, for a pipeline on meta."""
        return clip_stages(self, size)

    @property
    def transformer_config(self) -> Any:
        """The transformer's configuration; of a replacement that has none, the original's."""
        return getattr(self.transformer, "config", self._transformer_config)
