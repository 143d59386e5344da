"""A whole model of Stable Diffusion in one file under its original names, as a checkpoint with parts elsewhere."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

from lowtide.configs import CheckpointError
from lowtide.hub import Source, local_path
from lowtide.loading.components import MODELS
from lowtide.loading.elsewhere import Elsewhere, as_it_rests, open_weights
from lowtide.loading.model_index import MODEL_INDEX, ComponentSpec, component_folder, read_model_index
from lowtide.loading.original_kinds import PREDICTIONS, OriginalKind, kind_of
from lowtide.loading.original_weights import check_all_known, held_in, prefix_and_names
from lowtide.models.tokenizers import CLIPTokenizer, load_tokenizer
from lowtide.schedulers import SCHEDULERS
from lowtide.weights.index import CheckpointIndex

LEFT_OUT = ("safety_checker", "feature_extractor")
"""Components that nobody expects in one file: they are left out, as diffusers leaves them out."""
CLASSES_OF_PICTURES = ("StableDiffusionPipeline",)
"""The pipelines of ours that such files are for."""
WORDS = "clip_vocabulary"
"""The folder of the vocabulary that all these models share."""
_NETWORKS = {
    "unet": ("UNet2DConditionModel", "U-Net"),
    "vae": ("AutoencoderKL", "VAE"),
    "text_encoder": ("CLIPTextModel", "text encoder"),
}
"""The networks of such files: their classes, and what they are called in words."""


@dataclass(frozen=True)
class FileOptions:
    """What the header of a file of weights does not say.

    `config` is a folder or Hub id with configurations, None for those that were published with such a model;
    `prediction_type` what the model predicts, None for what such models usually do.
    """

    config: str | None = None
    prediction_type: str | None = None

    def __post_init__(self) -> None:
        """Raise `ValueError` for what no model predicts."""
        if self.prediction_type not in (None, *PREDICTIONS):
            raise ValueError(f"prediction_type={self.prediction_type!r:.80}: possible are {', '.join(PREDICTIONS)}.")


@dataclass(frozen=True, eq=False)
class OriginalFile:
    """A file of weights, what it holds, and where the configurations that belong to it are.

    `configs` is None for models that no pipeline of ours is for.
    """

    index: CheckpointIndex
    kind: OriginalKind
    options: FileOptions
    configs: Source | None

    @classmethod
    def at(cls, source: Source, options: FileOptions) -> OriginalFile | None:
        """What a name stands for, if it is that of a file; its header is read, and none of its weights.

        Raises `UnsafeWeightsError` for pickled files, and `CheckpointError` for malformed ones, for what is no whole
        model, and for models of ours that have no published configurations, where none are given.
        """
        path = local_path(source.name)
        if not path.is_file():
            return None
        index = open_weights(path)
        kind = kind_of(index, options.prediction_type)
        if kind.is_ours:
            index = as_it_rests(index)
        if options.config is not None:
            configs = replace(source, name=options.config, revision=None)
            is_ours = kind.is_ours and read_model_index(configs.fetch([MODEL_INDEX]))[0] in CLASSES_OF_PICTURES
            return cls(index, kind, options, configs if is_ours else None)
        if kind.is_ours and kind.configs is None:
            raise CheckpointError(
                f"{path} looks like {kind.name}, but its U-Net reads states of another width than those that were "
                "published: give config= (--config), a folder or Hub id with the configurations that belong to it."
            )
        return cls(index, kind, options, Source(str(published_configs(kind))) if kind.is_ours else None)

    def networks(self, specs: Mapping[str, ComponentSpec | None], given: Collection[str]) -> dict[str, Elsewhere]:
        """The networks that the file holds, but for those `given`.

        One that it lacks is where its configuration is, if that was said. Raises `CheckpointError`, which names some,
        for weights that are missing, of another shape, or of no network, and for networks that are nowhere.
        """
        found: dict[str, Elsewhere] = {}
        held = []
        for name, spec in specs.items():
            own_class, in_words = _NETWORKS.get(name, (None, ""))
            if spec is None or spec.class_name != own_class or name in given:
                continue
            folder, cls = component_folder(self._folder(), name), MODELS[spec.class_name]
            config = cls.read_config(folder)
            place = prefix_and_names(config, self.index)
            if place is not None:
                held.append(held_in(self.index, cls.on_meta(folder, config, self.index), *place))
                found[name] = Elsewhere(folder, held[-1].weights)
            elif self.options.config is None:
                raise CheckpointError(f"{self.index.files[0]} holds no {in_words}: {_advice(name)}.")
        check_all_known(self.index, held)
        return found

    def small_parts(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """What is used beside the networks, but for what is `given`: the tokenizer and scheduler of such models."""
        parts: dict[str, Any] = {name: None for name in LEFT_OUT if name not in given}
        if self.options.config is None and "tokenizer" not in given:
            parts["tokenizer"] = load_tokenizer(self._folder() / "tokenizer", CLIPTokenizer.__name__, _assets(WORDS))
        told = self.options.prediction_type or (self.kind.predicts if self.options.config is None else None)
        spec = read_model_index(self._folder())[1].get("scheduler")
        if told is not None and "scheduler" not in given and spec is not None and spec.class_name in SCHEDULERS:
            scheduler = SCHEDULERS[spec.class_name].from_pretrained(self._folder() / "scheduler")
            parts["scheduler"] = type(scheduler).from_config(scheduler.config.changed({"prediction_type": told}))
        return parts

    def own_configs(self) -> Source:
        """Where its configurations are. Raises `ValueError`, which says what it is, for what is no model of ours."""
        if self.configs is None:
            raise ValueError(
                f"{self.index.files[0]} is {self.kind.name}. Lowtide's own pipelines read files of Stable Diffusion "
                "1.x and 2.x that make pictures from text alone; lowtide.load(FILE) and --model FILE run others by "
                "those of diffusers."
            )
        return self.configs

    def _folder(self) -> Path:
        return self.own_configs().fetch([MODEL_INDEX, "*/*.json", "*/*.txt"])


def configs_of(source: Source, options: FileOptions) -> Source:
    """Where the configurations of a checkpoint of ours are: in itself or, for a file, beside it or in this package.

    Raises `ValueError` for options of a file where it is none, and for a file that holds no model of ours.
    """
    original = OriginalFile.at(source, options)
    if original is not None:
        return original.own_configs()
    check_no_options(source, options)
    return source


def check_no_options(source: Source, options: FileOptions) -> None:
    """Raise `ValueError` for options of a file beside a folder or Hub id."""
    for name, value in vars(options).items():
        if value is not None:
            raise ValueError(f"{name}={value!r} is for a file of weights; {source.name} has its own configurations.")


def published_configs(kind: OriginalKind) -> Path:
    """The folder of configurations that were published for such models."""
    assert kind.configs is not None
    return _assets("published_configs") / kind.configs


def _assets(name: str) -> Path:
    return Path(str(resources.files("lowtide"))) / "assets" / name


def _advice(component: str) -> str:
    if component == "vae":
        return "give one, vae=FILE (--vae FILE), or its folder or Hub id"
    return f"give one, {component}=, or take the file of the whole model"
