"""Load any pipeline within a budget: planned from its configurations, then filled from its files under the plan."""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch

from lowtide.fitting.budgets import Asked, parse_budgets
from lowtide.guests.checkpoint import GuestCheckpoint, is_file_for
from lowtide.guests.guest_dtype import guest_dtypes, load_in
from lowtide.hub import Source
from lowtide.loading.model_index import MODEL_INDEX, read_model_index
from lowtide.loading.original_file import CLASSES_OF_PICTURES, FileOptions, OriginalFile, check_no_options
from lowtide.memory.presets import execution_device
from lowtide.models.load_arguments import chosen_dtype
from lowtide.pipelines.base import DiffusionPipeline
from lowtide.pipelines.load import BY_PATH
from lowtide.pipelines.own_dtype import own_dtypes
from lowtide.pipelines.parts import KINDS
from lowtide.planning.plan import check_allowed


def load(
    model: str | os.PathLike[str],
    vram: Asked = None,
    ram: Asked = None,
    *,
    disk: Asked = None,
    allow: Collection[str] = (),
    device: torch.device | str | None = None,
    torch_dtype: torch.dtype | str | None = None,
    dtype: torch.dtype | str | None = None,
    variant: str | None = None,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
    config: str | os.PathLike[str] | None = None,
    prediction_type: str | None = None,
    native: bool = True,
    **components_and_call: Any,
) -> Any:
    """Load any pipeline within budgets of bytes, and keep it within them.

    `model` is a folder with a `model_index.json`, a Hub id, or a `.safetensors` file of a whole pipeline, whose
    configurations are in the folder or Hub id `config`; None is those that were published for Stable Diffusion 1.x or
    2.x, which `prediction_type` may choose among (see `StableDiffusionPipeline.from_single_file`), and for others on
    the Hub, where diffusers finds them. It is planned from configurations alone; then every network is filled from its
    own files, or left there, as the plan says. The pipeline is of our class where we have one, and of diffusers' else,
    where files are given for other components than a VAE, or with `native=False`. `dtype` (or
    `torch_dtype`) is the one to compute in. None, on a CPU, is the fastest by this machine's measured speeds of those
    that are right for the model, and of those as fast that of the files (float32 for pipelines of ours); elsewhere it
    is that of the files, as "auto" is everywhere. Weights rest as the files have them. Further arguments are components
    to use in place of the checkpoint's, or `.safetensors` and `.gguf` files of their weights, and arguments of the call
    to plan for, such as `height`; both by the pipeline's own names. See `lowtide.fit` for budgets and `allow`.
    Raises `BudgetError` before a byte of weights is read where no plan fits, `FileNotFoundError` for a missing model,
    file or variant, and for configurations of a file that cannot be fetched, `CheckpointError` for malformed files and
    for components whose code is in no library, `NoGuestsError`, an `ImportError`, where diffusers is needed and not
    installed.
    """
    check_allowed(allow)
    cache = None if cache_dir is None else Path(cache_dir)
    source = Source(os.fspath(model), revision, cache, token, local_files_only)
    chosen = execution_device(device)
    budgets = parse_budgets(chosen, vram, ram, disk)
    asked = torch_dtype if dtype is None else dtype
    of_file = FileOptions(None if config is None else os.fspath(config), prediction_type)
    original = OriginalFile.at(source, of_file)
    if original is None:
        check_no_options(source, of_file)
    configs = source if original is None else original.configs
    class_name, specs, _ = ("", {}, {}) if configs is None else read_model_index(configs.fetch([MODEL_INDEX]))
    by_path = BY_PATH if class_name in CLASSES_OF_PICTURES else ()
    has_files = any(
        is_file_for(specs.get(name), value) for name, value in components_and_call.items() if name not in by_path
    )
    if native and configs is not None and class_name in KINDS and not has_files:
        given = {name: value for name, value in components_and_call.items() if name in specs}
        size = {name: value for name, value in components_and_call.items() if name not in specs}
        fastest = own_dtypes(configs, chosen.type)[0] if asked is None and chosen.type == "cpu" else "auto"
        return DiffusionPipeline.from_pretrained(
            model, dtype=asked or fastest, variant=variant, revision=revision, cache_dir=cache, token=token,
            local_files_only=local_files_only, vram=budgets.vram, ram=budgets.ram, disk=budgets.disk, allow=allow,
            offload_device=chosen, size=size, file_options=of_file, **given,
        )  # fmt: skip
    if prediction_type is not None:
        raise ValueError("prediction_type is for Stable Diffusion 1.x and 2.x; others' is in their configurations.")
    in_dtype = None if asked is None else chosen_dtype(asked, None)
    checkpoint = GuestCheckpoint.opened(source, components_and_call, in_dtype, variant, config)
    if asked is not None:
        return checkpoint.load(budgets, tuple(allow), chosen)
    parts = checkpoint.parts()
    return load_in(checkpoint, parts, guest_dtypes(checkpoint, parts, chosen)[0], budgets, tuple(allow), chosen)
