"""Options for a model in one file, and for parts beside a model: `--config`, `--vae`, `--tokenizer`, `--prediction`."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lowtide.cli.errors import InputError
from lowtide.hub import Source

if TYPE_CHECKING:
    from lowtide.loading.original_file import FileOptions

_PANEL = "Models in one file"
Config = Annotated[
    str | None,
    typer.Option(
        "--config",
        metavar="DIR_OR_ID",
        help="Where its configurations are.",
        show_default="those of Stable Diffusion; others' on the Hub",
        rich_help_panel=_PANEL,
    ),
]
Vae = Annotated[
    str | None,
    typer.Option(
        "--vae",
        metavar="FILE_OR_DIR",
        help="A VAE in place of the model's, for folders too.",
        show_default="the model's own",
        rich_help_panel=_PANEL,
    ),
]
Words = Annotated[
    str | None,
    typer.Option(
        "--tokenizer", metavar="DIR_OR_ID", help="A tokenizer.", show_default="CLIP's", rich_help_panel=_PANEL
    ),
]
Prediction = Annotated[
    str | None,
    typer.Option(
        "--prediction",
        metavar="NAME",
        help="What the model predicts: epsilon, v_prediction.",
        show_default="the usual of its kind",
        rich_help_panel=_PANEL,
    ),
]


@dataclass(frozen=True)
class Beside:
    """What is given beside a model; None for what is not. `config` and `prediction` are for one in a file."""

    vae: str | None = None
    tokenizer: str | None = None
    config: str | None = None
    prediction: str | None = None

    def components(self) -> dict[str, str]:
        """Parts in place of the model's, by name."""
        parts = {"vae": self.vae, "tokenizer": self.tokenizer}
        return {name: place for name, place in parts.items() if place is not None}

    def file_options(self) -> FileOptions | None:
        """What is said of the model's file; None where nothing is, so that a folder's import no torch."""
        if self.config is None and self.prediction is None:
            return None
        from lowtide.loading.original_file import FileOptions

        return FileOptions(self.config, self.prediction)

    def arguments(self) -> dict[str, Any]:
        """All of it, by the names of `from_pretrained`."""
        options = self.file_options()
        return {**self.components(), **({} if options is None else {"file_options": options})}

    def placed(self) -> Beside:
        """The same from any folder."""
        return Beside(**{field.name: _placed(getattr(self, field.name)) for field in fields(self)})

    def check_none_for_guests(self, model: str) -> None:
        """Raise `InputError` for what a pipeline of diffusers does not take; `config` it does."""
        for option, value in (("vae", self.vae), ("tokenizer", self.tokenizer), ("prediction", self.prediction)):
            if value is not None:
                raise InputError(
                    f"--{option} {value} is for Stable Diffusion 1.x and 2.x; {Path(model).name} is run by a pipeline "
                    f"of diffusers. In Python, lowtide.load(model, vae='FILE') gives it a VAE."
                )


NOTHING = Beside()


def configurations(model: str, beside: Beside) -> Source:
    """Where the configurations of a model of ours are. Raises `InputError` for options of a file where it is none."""
    if not Path(model).is_file():
        for option, value in (("config", beside.config), ("prediction", beside.prediction)):
            if value is not None:
                raise InputError(
                    f"--{option} {value} is for a .safetensors file of a whole pipeline; {model} has its own."
                )
        return Source(model)
    from lowtide.loading.original_file import FileOptions, configs_of

    return configs_of(Source(model), beside.file_options() or FileOptions())


def guest_class(model: str, beside: Beside) -> str | None:
    """The class of a pipeline of diffusers that a model is for; None for ours, and where it cannot be read.

    What cannot be read is told of where a model of ours is loaded. Nothing heavy is imported, but for files of weights.
    Raises `InputError` for options that such a model does not take, and as loading does for what a file holds.
    """
    from lowtide.configs import CheckpointError
    from lowtide.loading.model_index import MODEL_INDEX, read_model_index
    from lowtide.pipelines.parts import KINDS

    if Path(model).is_file():
        own = _class_in_file(model, beside)
    else:
        try:
            own = read_model_index(configurations(model, beside).fetch([MODEL_INDEX]))[0]
        except (FileNotFoundError, CheckpointError):
            return None
    if own is None or own in KINDS or not own:
        return None
    beside.check_none_for_guests(model)
    return own


def _class_in_file(file: str, beside: Beside) -> str | None:
    """The class of diffusers' pipeline for a file; None for ours."""
    from lowtide.loading.model_index import MODEL_INDEX, read_model_index
    from lowtide.loading.original_file import FileOptions, OriginalFile

    original = OriginalFile.at(Source(file), beside.file_options() or FileOptions())
    assert original is not None
    if original.configs is not None:
        return None
    where = Source(beside.config or file)
    if beside.config is None:
        from lowtide.guests import single_files

        single_files.file_of(file)  # raises for what holds one component
        where = single_files.configurations(where, single_files.opened(file), None)
    return read_model_index(where.fetch([MODEL_INDEX]))[0]


def _placed(where: str | None) -> str | None:
    return where if where is None or not Path(where).exists() else str(Path(where).absolute())
