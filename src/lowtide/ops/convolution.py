"""Convolution of maps `[B, C, H, W]` and clips `[B, C, F, H, W]`, by the kernel that suits their size and dtype.

The figures below were measured with one thread on two cores with AVX-512 BF16 instructions, PyTorch 2.13 with oneDNN.
"""

import torch
import torch.nn.functional as F

from lowtide.ops.meta_device import device_type

FEW_PIXELS = 256
"""The most output pixels of all maps of a batch for which a bfloat16 convolution on a CPU is one matrix product."""


_CONV2D, _CONV3D = F.conv2d, F.conv3d
"""PyTorch's own: where a script has put others in their places, those convolve."""


def conv2d(
    x_BCHW: torch.Tensor,
    weight: torch.Tensor,
    bias_O: torch.Tensor | None,
    stride: tuple[int, ...] = (1, 1),
    padding: tuple[int, ...] | str = (0, 0),
    dilation: tuple[int, ...] = (1, 1),
    groups: int = 1,
) -> torch.Tensor:
    """Convolve with `weight` `[O, C / groups, K, K]`: `[B, C, H, W]` to `[B, O, h, w]`.

    On a CPU, PyTorch's bfloat16 kernel rearranges the whole weight on every call. If the map has few pixels, that takes
    longer than the arithmetic, and memory for a second weight. Such maps are convolved by a matrix product, which reads
    the weight as it lies: 7 ms instead of 45 ms for 2560 to 1280 channels and two maps of 4x4. The product sums in
    another order, so results may differ from the kernel's by the rounding of bfloat16. Every other convolution is
    PyTorch's own.
    """
    is_bfloat16_on_cpu = device_type(x_BCHW) == "cpu" and x_BCHW.dtype == torch.bfloat16 and F.conv2d is _CONV2D
    is_square = len({*stride}) == len({*weight.shape[2:]}) == 1 and {*dilation, groups} == {1}
    if is_bfloat16_on_cpu and is_square and not isinstance(padding, str) and len({*padding}) == 1:
        step, around = stride[0], padding[0]
        rows, columns = ((side + 2 * around - weight.shape[-1]) // step + 1 for side in x_BCHW.shape[2:])
        if len(x_BCHW) * rows * columns <= FEW_PIXELS:
            return conv2d_as_product(x_BCHW, weight, bias_O, stride=step, padding=around)
    return F.conv2d(x_BCHW, weight, bias_O, stride, padding, dilation, groups)


def conv2d_as_product(
    x_BCHW: torch.Tensor, weight: torch.Tensor, bias_O: torch.Tensor | None, *, stride: int, padding: int
) -> torch.Tensor:
    """Convolve as one product: the weight `[O, C·K·K]` times a column of `C·K·K` values for each output pixel.

    For a weight with channels last the order is `K·K·C`, so that the weight is read as it lies. The result has the
    layout of the map.
    """
    size = weight.shape[-1]
    padded = F.pad(x_BCHW, (padding,) * 4)
    patches_BCHWKK = padded.unfold(2, size, stride).unfold(3, size, stride)
    batch, _, rows, columns, _, _ = patches_BCHWKK.shape
    if weight.is_contiguous():
        patches, matrix = patches_BCHWKK.permute(1, 4, 5, 0, 2, 3), weight.flatten(1)
    else:
        patches, matrix = patches_BCHWKK.permute(4, 5, 1, 0, 2, 3), weight.permute(0, 2, 3, 1).flatten(1)
    flat = patches.reshape(matrix.shape[1], -1)
    product = matrix @ flat if bias_O is None else torch.addmm(bias_O[:, None], matrix, flat)
    layout = torch.contiguous_format if x_BCHW.is_contiguous() else torch.channels_last
    return product.view(-1, batch, rows, columns).transpose(0, 1).contiguous(memory_format=layout)


def conv3d(
    x_BCFHW: torch.Tensor,
    weight: torch.Tensor,
    bias_O: torch.Tensor | None,
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    groups: int,
) -> torch.Tensor:
    """Convolve a clip, without gradients: `[B, C, F, H, W]` to `[B, O, f, h, w]`.

    In float32 on a CPU, PyTorch convolves a single small clip by copying each of its entries once for every entry of
    the kernel: 27 times the memory of the clip for a 3x3x3 kernel, and five times the time. Here oneDNN's kernel is
    called for clips of every size.
    """
    has_kernel = device_type(x_BCFHW) == "cpu" and x_BCFHW.dtype == torch.float32 and F.conv3d is _CONV3D
    if has_kernel and torch.backends.mkldnn.is_available():
        return torch.ops.aten.mkldnn_convolution(x_BCFHW, weight, bias_O, padding, stride, dilation, groups)
    return F.conv3d(x_BCFHW, weight, bias_O, stride, padding, dilation, groups)


def channels_last(x: torch.Tensor) -> torch.memory_format:
    """The layout with the channels of each pixel side by side, for maps `[B, C, H, W]` or clips `[B, C, F, H, W]`."""
    return torch.channels_last_3d if x.ndim == 5 else torch.channels_last


def in_faster_layout(x: torch.Tensor) -> torch.Tensor:
    """Lay a map out with channels last if that makes convolutions of large maps faster: in bfloat16 on a CPU.

    With channels first every convolution rearranges its map before and after, and holds both forms. With channels last
    a 256x256 picture is decoded in 2.0 s with 92 MB of activations, instead of 2.4 s with 131 MB. A float32 map stays
    as it is, because PyTorch's group norm loses digits with channels last: the relative error is 3e-5 instead of 4e-7
    for a group whose mean is ten times its deviation.
    """
    if device_type(x) == "cpu" and x.dtype == torch.bfloat16:
        return x.contiguous(memory_format=channels_last(x))
    return x
