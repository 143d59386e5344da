"""The base of networks whose files are as `transformers` writes them: `config.json` and `model.safetensors`."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from lowtide.configs import write_json
from lowtide.models.mixin import CONFIG_NAME, ModelMixin
from lowtide.models.put_weights import resting_state
from lowtide.weights.fill import dtype_name
from lowtide.weights.save import save_tensors


class TransformersLayout(ModelMixin):
    """Base of encoders: as `ModelMixin`, with weights in `model[.VARIANT].safetensors`, or in shards of it."""

    library: ClassVar[str] = "transformers"
    weights_name: ClassVar[str] = "model"
    prefixes: ClassVar[tuple[str, str]] = ("", "")
    """What names of weights begin with here, and in published files."""
    model_type: ClassVar[str]

    def write_to(self, folder: Path, *, variant: str | None, max_shard_size: int | str | None) -> None:
        """Write configuration and weights into an existing folder, under the published names."""
        write_json(folder / CONFIG_NAME, self.published_config())
        tensors = {self.published_name(name): tensor for name, tensor in resting_state(self).items()}
        save_tensors(tensors, folder, self.weights_name, variant=variant, max_shard_size=max_shard_size)

    def published_config(self) -> dict[str, Any]:
        """The contents of `config.json`."""
        own = {"architectures": [type(self).__name__], "model_type": self.model_type, "dtype": dtype_name(self.dtype)}
        return {**self.config.to_dict(), **own}

    def published_name(self, name: str) -> str:
        """The name of a weight in published files."""
        here, there = self.prefixes
        return there + name.removeprefix(here) if name.startswith(here) else name
