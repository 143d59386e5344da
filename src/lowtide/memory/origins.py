"""What becomes of the file's pages when the weights of a model are converted."""

from __future__ import annotations

from collections.abc import Callable

import torch

from lowtide.weights.files import let_go_of_file, origin_of, remember_origin


def keeping_origins(fn: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
    """`fn`, as it is given to `Module._apply`, and for each weight of a file that it makes a copy of on the CPU:

    the pages of the file are dropped at once, so that no two copies are in memory; and the place in the file is
    remembered, so that the copy can rest there.
    """

    def convert(tensor: torch.Tensor) -> torch.Tensor:
        made = fn(tensor)
        if not _is_copy_on_host(made, tensor):
            return made
        origin = origin_of(tensor)
        if origin is not None:
            let_go_of_file(tensor)
            remember_origin(tensor, origin)  # the parameter stays, what it holds is changed
        return made

    return convert


def _is_copy_on_host(made: torch.Tensor, tensor: torch.Tensor) -> bool:
    is_on_host = type(tensor) is torch.nn.Parameter and tensor.device.type == made.device.type == "cpu"
    return is_on_host and made.data_ptr() != tensor.data_ptr()
