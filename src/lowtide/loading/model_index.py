"""A checkpoint's `model_index.json`: the class of its pipeline, and the components by name. Free of torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowtide.configs import CheckpointError, read_json

MODEL_INDEX = "model_index.json"
CLASSES = (
    "UNet2DConditionModel", "AutoencoderKL", "AutoencoderKLCogVideoX", "CogVideoXTransformer3DModel",
    "DDIMScheduler", "PNDMScheduler", "UniPCMultistepScheduler", "EulerDiscreteScheduler",
    "DPMSolverMultistepScheduler", "CogVideoXDDIMScheduler", "CogVideoXDPMScheduler",
    "CLIPTextModel", "T5EncoderModel",
    "CLIPTokenizer", "CLIPTokenizerFast", "T5Tokenizer", "T5TokenizerFast",
    "CLIPImageProcessor", "CLIPImageProcessorFast", "CLIPImageProcessorPil", "CLIPFeatureExtractor",
    "StableDiffusionSafetyChecker",
)  # fmt: skip
"""Every class that a component can have; `loading/components.py` knows how each is loaded."""


@dataclass(frozen=True)
class ComponentSpec:
    """One line of `model_index.json`: the component's name, the library that defines its class, and the class."""

    name: str
    library: str
    class_name: str


def read_model_index(folder: Path) -> tuple[str, dict[str, ComponentSpec | None], dict[str, Any]]:
    """The pipeline's class name, its components (None where the entry is null), and its other settings."""
    file = folder / MODEL_INDEX
    if not file.is_file():
        names = sorted(path.name for path in folder.iterdir())[:20]
        raise FileNotFoundError(
            f"{folder} has no {MODEL_INDEX}, so it is not a pipeline's folder; it holds {names or 'nothing'}. "
            "A single model is loaded with its own class, such as UNet2DConditionModel.from_pretrained."
        )
    content = read_json(file)
    components: dict[str, ComponentSpec | None] = {}
    settings: dict[str, Any] = {}
    for name, entry in content.items():
        if name.startswith("_"):
            continue
        if isinstance(entry, list) and not _is_setting(folder, name, entry):
            components[name] = _component_spec(file, name, entry)
        else:
            settings[name] = entry
    class_name = content.get("_class_name", "")
    if not isinstance(class_name, str):
        raise CheckpointError(f"{file}: _class_name={class_name!r:.80} is not possible; it is the name of a pipeline.")
    return class_name[:80], components, settings


def config_patterns(specs: Mapping[str, ComponentSpec | None]) -> Iterator[str]:
    """Patterns of the files that say what the components are like, besides weights."""
    yield from (f"{name}/*.json" for name, spec in specs.items() if spec is not None)


def check_class(spec: ComponentSpec) -> None:
    """Raise `ValueError` for a component of a class that Lowtide does not have."""
    if spec.class_name not in CLASSES:
        raise ValueError(
            f"Component {spec.name!r} is a {spec.class_name!r} of {spec.library!r}, which Lowtide does not have; it "
            f"has {', '.join(CLASSES)}. Load it yourself and pass it in: from_pretrained(..., {spec.name}=...)."
        )


def component_folder(folder: Path, name: str) -> Path:
    """The folder of a component; raises `FileNotFoundError` where there is none."""
    if not (folder / name).is_dir():
        raise FileNotFoundError(f"{folder} has no folder {name!r}, which its {MODEL_INDEX} names as a component.")
    return folder / name


def _is_setting(folder: Path, name: str, entry: list[Any]) -> bool:
    """Whether a list is a setting, such as the layers that Krea 2 reads: it names nothing, and has no folder."""
    names_something = any(part is None or isinstance(part, str) for part in entry)
    return not names_something and name.isidentifier() and not (folder / name).exists()


def _component_spec(file: Path, name: str, entry: list[Any]) -> ComponentSpec | None:
    if len(entry) != 2 or not all(part is None or isinstance(part, str) for part in entry):
        raise CheckpointError(f"{file}: entry {name[:80]!r} must be [library, class], not {entry!r:.200}.")
    if not name.isidentifier():
        raise CheckpointError(f"{file}: {name[:80]!r} cannot be the name of a component.")
    library, class_name = entry
    return None if library is None or class_name is None else ComponentSpec(name, library[:80], class_name[:80])
