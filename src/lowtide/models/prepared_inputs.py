"""What tokenizers and image processors make for networks: entries by name, also as attributes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    import torch


class PreparedInputs(dict[str, Any]):
    """A dictionary of lists or tensors, as in `network(**inputs)`, whose entries are attributes as well."""

    if not TYPE_CHECKING:  # a checker would take every name for an entry

        def __getattr__(self, name: str) -> Any:
            """The entry called `name`."""
            if name not in self:
                raise AttributeError(f"There is no {name!r} here; there are {sorted(self)}.")
            return self[name]

    else:
        input_ids: Any
        attention_mask: Any
        pixel_values: Any

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """The same with every tensor moved by `torch.Tensor.to`; a dtype is for numbers with fractions alone."""
        import torch

        moved = {name: _moved(value, args, kwargs) for name, value in self.items() if isinstance(value, torch.Tensor)}
        return type(self)({**self, **moved})


def _moved(tensor: torch.Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    import torch

    if tensor.is_floating_point():
        return tensor.to(*args, **kwargs)
    kept = [value for value in args if not isinstance(value, torch.dtype)]
    return tensor.to(*kept, **{name: value for name, value in kwargs.items() if name != "dtype"})
