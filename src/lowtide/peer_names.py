"""Names of diffusers, the peer, that Lowtide does not have, each with what to use here: one table for all classes.

An attribute of this table that is read or assigned is an `AttributeError`, an argument a `TypeError`; so a script
written for the peer is never served in silence by something that has no effect.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

_ADAPTERS = "adapters (IP adapters, LoRA, textual inversion) are not read; merge them into the checkpoint's weights"
_STATE = "the scheduler keeps its own history; call set_timesteps to begin anew"
_NOISE = (
    "it follows from the configuration: build another scheduler with from_config(config, ...), or assign alphas_cumprod"
)
_FIXED_PARTS = "the network is built of other parts, which its configuration says"
_SPACING = "build one that knows it, as in DPMSolverMultistepScheduler.from_config(config, use_karras_sigmas=True)"
_ROWS = "use enable_tiling and decode, or decode_rows"
_FUSED = "attention is computed as it is; choose how with set_attention_backend"
_HOOKS = "use enable_model_cpu_offload, enable_group_offload or fit, and their opposites"
_BUDGET = "give budgets instead: vram=, ram= and disk="

_OF_ADAPTERS = """
load_ip_adapter unload_ip_adapter set_ip_adapter_scale load_lora_weights unload_lora_weights fuse_lora
unfuse_lora set_adapters get_active_adapters get_list_adapters enable_lora disable_lora delete_adapters
set_lora_device load_textual_inversion unload_textual_inversion maybe_convert_prompt load_lora_adapter
save_lora_adapter add_adapter set_adapter load_attn_procs save_attn_procs save_lora_weights
"""
_OF_HISTORIES = """
model_outputs lower_order_nums last_sample timestep_list counter ets cur_sample cur_model_output pndm_order
_timesteps
"""

INSTEAD: dict[str, str] = {
    # arguments of a call
    "ip_adapter_image": _ADAPTERS,
    "ip_adapter_image_embeds": _ADAPTERS,
    "timestep_cond": "models that are conditioned on guidance are not built",
    # arguments of from_pretrained
    "custom_pipeline": "import its class and build it from pipe.components",
    "custom_revision": "import the pipeline's class and build it from pipe.components",
    "provider": "ONNX models are not run; load safetensors",
    "provider_options": "ONNX models are not run; load safetensors",
    "sess_options": "ONNX models are not run; load safetensors",
    "use_onnx": "ONNX models are not run; load safetensors",
    "use_flashpack": "load safetensors",
    "flashpack_kwargs": "load safetensors",
    "original_config": "give config=, a folder or Hub id with configurations as from_pretrained reads them",
    "original_config_file": "give config=, a folder or Hub id with configurations as from_pretrained reads them",
    "scheduler_type": "give scheduler=, or assign pipe.scheduler",
    "scaling_factor": "give config=, in which vae/config.json says it",
    "load_safety_checker": "give safety_checker= and feature_extractor=",
    "extract_ema": "the averages of weights are left out",
    "image_size": "give height= and width= to the call",
    "num_in_channels": "it follows from the file",
    "disable_mmap": "weights are read from the mapped file; with dtype= other than the file's they are copies",
    "max_memory": _BUDGET,
    "offload_folder": _BUDGET + "; weights rest in the checkpoint's own files",
    "offload_state_dict": _BUDGET + "; weights rest in the checkpoint's own files",
    "proxies": "set HTTPS_PROXY",
    "quantization_config": "let weights rest in few bits with casting='fp8', 'int8' or 'int4'",
    "load_connected_pipeline": "load each pipeline by itself",
    "output_loading_info": "keys that do not match are errors, so there is nothing to tell",
    "ignore_mismatched_sizes": "every shape must match",
    # attributes of pipelines
    "from_single_file": "StableDiffusionPipeline.from_single_file(FILE, vae=FILE) loads a pipeline",
    "from_config": "load with from_pretrained, or give the components to the class itself",
    "load_config": "read pipe.config, or the model_index.json",
    "download": "from_pretrained downloads what it needs",
    "image_encoder": _ADAPTERS,
    "image_processor": "choose the form of the pictures with output_type, or decode with pipe.decode_latents",
    "video_processor": "choose the form of the frames with output_type, or decode with pipe.decode_latents",
    "numpy_to_pil": "choose output_type='pil'",
    "return_unused_kwargs": "names that are not known are errors",
    "compatibles": "lowtide.schedulers.SCHEDULERS lists the schedulers",
    "progress_bar": "add an observer to pipe.stages.observers",
    "_progress_bar_config": "call set_progress_bar_config",
    "vae_scale_factor_spatial": "it is pipe.vae_scale_factor, which follows from the autoencoder's configuration",
    "vae_scale_factor_temporal": "it is pipe.vae.config.temporal_compression_ratio",
    "vae_scaling_factor_image": "it is pipe.vae.config.scaling_factor",
    "_is_unet_config_sample_size_int": "it follows from unet.config.sample_size",
    "register_modules": "assign components, as in pipe.vae = vae",
    "register_to_config": "give it to the class when the pipeline is built",
    "hf_device_map": "networks are on pipe.device, or come to it under an offload",
    "reset_device_map": "call pipe.to(device)",
    "model_cpu_offload_seq": "components come to work when they are called; keep some with exclude_modules",
    "_exclude_from_cpu_offload": "use exclude_modules of enable_group_offload",
    "maybe_free_model_hooks": _HOOKS,
    "remove_all_hooks": _HOOKS,
    "_execution_device": "use pipe.device",
    "name_or_path": "keep the name that from_pretrained was given",
    "push_to_hub": "save with save_pretrained, and upload the folder with `hf upload`",
    "check_inputs": "a call checks its arguments itself",
    "prepare_extra_step_kwargs": "every scheduler's step takes eta and generator",
    "prepare_ip_adapter_image_embeds": _ADAPTERS,
    "get_guidance_scale_embedding": "models that are conditioned on guidance are not built",
    "encode_image": _ADAPTERS,
    "enable_freeu": "FreeU is not built",
    "disable_freeu": "FreeU is not built",
    "fuse_qkv_projections": _FUSED,
    "unfuse_qkv_projections": _FUSED,
    "set_attention_slice": "use enable_attention_slicing",
    "lora_scale": _ADAPTERS,
    "_lora_scale": _ADAPTERS,
    **dict.fromkeys(_OF_ADAPTERS.split(), _ADAPTERS),
    "fused_loras": _ADAPTERS,
    "num_fused_loras": _ADAPTERS,
    "parameters": "it is pipe.components",
    # attributes of models
    "is_gradient_checkpointing": "models are for inference",
    "is_cache_enabled": "steps are all computed; caches between steps are not built",
    "attn_processors": _FUSED,
    "set_attn_processor": _FUSED,
    "set_default_attn_processor": "use set_attention_backend('sdpa')",
    "reset_attention_backend": "use set_attention_backend('sdpa')",
    "set_use_memory_efficient_attention_xformers": "use enable_xformers_memory_efficient_attention",
    "enable_gradient_checkpointing": "models are for inference",
    "disable_gradient_checkpointing": "models are for inference",
    "gradient_checkpointing": "models are for inference",
    "_gradient_checkpointing_func": "models are for inference",
    "enable_cache": "steps are all computed; caches between steps are not built",
    "compile_repeated_blocks": "compile the network: torch.compile(pipe.unet)",
    "num_parameters": "use sum(weight.numel() for weight in model.parameters())",
    "get_memory_footprint": "use pipe.fit(...) and pipe.report()",
    "tiled_encode": _ROWS,
    "tiled_decode": _ROWS,
    "blend_h": _ROWS,
    "blend_v": _ROWS,
    "class_embedding": _FIXED_PARTS,
    "encoder_hid_proj": _FIXED_PARTS,
    "time_embed_act": _FIXED_PARTS,
    "ofs_proj": _FIXED_PARTS,
    "num_upsamplers": "it follows from the configuration: len(config.block_out_channels) - 1",
    "sample_size": "it is unet.config.sample_size; give height= and width= to the call",
    "_internal_dict": "build another one with from_config",
    # attributes of schedulers
    "betas": _NOISE,
    "alphas": _NOISE,
    "alpha_t": _NOISE,
    "sigma_t": _NOISE,
    "lambda_t": _NOISE,
    "use_karras_sigmas": _SPACING,
    "use_exponential_sigmas": _SPACING,
    "use_beta_sigmas": _SPACING,
    "disable_corrector": "build one that knows it: UniPCMultistepScheduler.from_config(config, disable_corrector=...)",
    "predict_x0": "build one that knows it: UniPCMultistepScheduler.from_config(config, predict_x0=...)",
    "solver_p": "UniPC predicts by itself; leave it out",
    "is_scale_input_called": "scale_model_input may be called or not",
    "prk_timesteps": "they are the first of timesteps",
    "plms_timesteps": "they are among timesteps",
    "step_prk": "call step",
    "step_plms": "call step",
    "convert_model_output": "call step, whose result has pred_original_sample",
    "index_for_timestep": "step finds the place of a timestep itself; set_begin_index tells it where to begin",
    **dict.fromkeys(_OF_HISTORIES.split(), _STATE),
}
"""The peer's name -> what there is instead, in words."""

_READ_ONLY = {
    "quant_conv": "this network has none",
    "post_quant_conv": "this network has none",
    "config": "build another one with from_config(config, entry=value)",
    "components": "assign the components themselves, as in pipe.vae = vae",
    "device": "call .to(device)",
    "dtype": "call .to(dtype)",
    "vae_scale_factor": "it follows from the autoencoder's configuration",
    "init_noise_sigma": "multiply the latents that you give to the call",
    "step_index": "assign _step_index, or call set_begin_index",
    "begin_index": "call set_begin_index",
}


class PeerNames:
    """Base of classes that scripts for the peer use: its other names are errors that say what there is instead."""

    if not TYPE_CHECKING:  # a checker would take every name for an attribute

        def __getattr__(self, name: str) -> Any:
            """Look further up, then raise `AttributeError`."""
            above = getattr(super(), "__getattr__", None)
            if name in INSTEAD:
                raise AttributeError(missing(type(self).__name__, name))
            if above is not None:
                return above(name)
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

        def __setattr__(self, name: str, value: Any) -> None:
            """Assign what is ours; raise `AttributeError` for what would have no effect."""
            own = getattr(type(self), name, None)
            if own is None and name in INSTEAD:
                raise AttributeError(missing(type(self).__name__, name))
            if (isinstance(own, property) and own.fset is None) or (name == "config" and name in self.__dict__):
                hint = _READ_ONLY.get(name, "it is told to the call")
                raise AttributeError(f"{type(self).__name__}.{name} cannot be assigned: {hint}.")
            super().__setattr__(name, value)


def missing(owner: str, name: str) -> str:
    """The message for a name of the peer that `owner` does not have."""
    return f"{owner} has no {name!r}, which diffusers has: {INSTEAD[name]}."


def refuse_arguments(owner: str, arguments: Mapping[str, Any]) -> None:
    """Raise `TypeError` for arguments that `owner` does not take; those of the peer may ask for nothing (None, False).

    The message says what there is instead.
    """
    for name, value in arguments.items():
        if name not in INSTEAD:
            raise TypeError(f"{owner} takes no argument {name!r}.")
        if value is not None and value is not False:
            raise TypeError(missing(owner, name))
