"""Positions of tokens in a video: rotary embeddings of queries and keys, or sines and cosines added to the tokens.

Shapes: `F h w` frames, rows and columns of tokens (of patches, not of latents).
"""

from __future__ import annotations

import torch

from lowtide.models.video_transformer_config import CogVideoXTransformer3DConfig

THETA = 10000.0
SLAB = 1024
"""How many tokens are rotated at once: a rotation takes memory for their float32 copies alone."""


def token_grid(config: CogVideoXTransformer3DConfig, frames: int, height: int, width: int) -> tuple[int, int, int]:
    """Frames, rows and columns of tokens of latents `[B, frames, C, height, width]`.

    Raises `ValueError` for latents that do not split into patches.
    """
    patch, patch_t = config.patch_size, config.patch_size_t or 1
    if min(frames, height, width) < 1 or height % patch or width % patch or frames % patch_t:
        raise ValueError(
            f"Latents of {frames} frames, {height}x{width}, do not split into patches of {patch_t} frames, "
            f"{patch}x{patch}: each must be a multiple."
        )
    return frames // patch_t, height // patch, width // patch


def rotary_embedding(
    config: CogVideoXTransformer3DConfig,
    height: int,
    width: int,
    frames: int,
    device: torch.device | str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines for latents of this height, width and number of frames: two `[F·h·w, head_dim]` in float32.

    A quarter of the head turns with the frame, three eighths each with the row and the column; neighbours in the head
    form a pair that turns together (Su et al. 2021, sec. 3.2; Yang et al. 2024, sec. 2.2). A size other than the
    configured one is scaled to fit into it, keeping its aspect, and centred; version 1.5 counts from the corner.
    Raises `ValueError` for sizes that do not split into patches, or, in version 1.5, exceed the configured one.
    """
    grid_t, grid_h, grid_w = token_grid(config, frames, height, width)
    if config.patch_size_t is None:
        rows, columns = _fitted(config, grid_h, grid_w, device)
    else:
        rows, columns = _counted(config, grid_h, grid_w, device)
    times = torch.arange(grid_t, dtype=torch.float32, device=device)
    head, eighths = config.attention_head_dim, config.attention_head_dim // 8
    angles = [_angles(times, head // 4), _angles(rows, 3 * eighths), _angles(columns, 3 * eighths)]
    return _combined([angle.cos() for angle in angles]), _combined([angle.sin() for angle in angles])


def _angles(positions: torch.Tensor, dim: int) -> torch.Tensor:
    """The angles `[positions, dim]`, each twice in a row."""
    exponents = torch.arange(0, dim, 2, dtype=torch.float32, device=positions.device) / dim
    return torch.outer(positions, 1.0 / THETA**exponents).repeat_interleave(2, dim=1)


def _counted(
    config: CogVideoXTransformer3DConfig, rows: int, columns: int, device: torch.device | str | None
) -> tuple[torch.Tensor, torch.Tensor]:
    most = config.sample_height // config.patch_size, config.sample_width // config.patch_size
    if rows > most[0] or columns > most[1]:
        size = f"{rows * config.patch_size}x{columns * config.patch_size}"
        raise ValueError(
            f"Latents of {size} are larger than the {config.sample_height}x{config.sample_width} that the model knows "
            "positions for."
        )
    return tuple(torch.arange(count, dtype=torch.float32, device=device) for count in (rows, columns))  # type: ignore[return-value]


def _fitted(
    config: CogVideoXTransformer3DConfig, rows: int, columns: int, device: torch.device | str | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions of rows and columns in the configured grid, into which their grid is scaled and centred."""
    full_h, full_w = config.sample_height // config.patch_size, config.sample_width // config.patch_size
    if rows / columns > full_h / full_w:
        high, wide = full_h, round(full_h / rows * columns)
    else:
        high, wide = round(full_w / columns * rows), full_w
    top, left = round((full_h - high) / 2), round((full_w - wide) / 2)
    return _spread(top, top + high, rows, device), _spread(left, left + wide, columns, device)


def _spread(start: int, stop: int, count: int, device: torch.device | str | None) -> torch.Tensor:
    return torch.linspace(start, stop * (count - 1) / count, count, dtype=torch.float32, device=device)


def _combined(axes: list[torch.Tensor]) -> torch.Tensor:
    """One table `[F·h·w, D]` of the tables `[F, ·]`, `[h, ·]` and `[w, ·]`."""
    times, rows, columns = axes
    grid = (len(times), len(rows), len(columns))
    parts = [times[:, None, None], rows[None, :, None], columns[None, None, :]]
    return torch.cat([part.expand(*grid, -1) for part in parts], dim=-1).flatten(0, 2)


def rotate(x_BLNH: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor]) -> None:
    """Turn queries or keys `[B, L, N, H]` in place by cosines and sines `[L, H]`, in float32, some tokens at a time.

    float64 stays float64. Raises `ValueError` for tables of other sizes.
    """
    cos_LH, sin_LH = (table.to(x_BLNH.device) for table in rotary)
    if not cos_LH.shape == sin_LH.shape == (x_BLNH.shape[1], x_BLNH.shape[3]):
        raise ValueError(
            f"image_rotary_emb has tables of {list(cos_LH.shape)} and {list(sin_LH.shape)}; these latents need "
            f"{[x_BLNH.shape[1], x_BLNH.shape[3]]}."
        )
    wide = torch.promote_types(x_BLNH.dtype, torch.float32)
    for start in range(0, x_BLNH.shape[1], SLAB):
        slab = slice(start, start + SLAB)
        part = x_BLNH[:, slab].to(wide)
        first, second = part.unflatten(-1, (-1, 2)).unbind(-1)
        turned = torch.stack([-second, first], dim=-1).flatten(-2) * sin_LH[slab, None]
        x_BLNH[:, slab] = part * cos_LH[slab, None] + turned


def sincos_axes(
    config: CogVideoXTransformer3DConfig, grid: tuple[int, int, int]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sines and cosines of frames `[F, C/4]`, columns `[w, 3C/8]` and rows `[h, 3C/8]`, in float64 on the CPU.

    Side by side in this order, each repeated over the other two, they are a token's position (Vaswani et al. 2017,
    sec. 3.5, over three axes).
    """
    dim, (frames, rows, columns) = config.inner_dim, grid
    space, time = config.spatial_interpolation_scale, config.temporal_interpolation_scale
    return (
        _sincos(frames, time, dim // 4),
        _sincos(columns, space, 3 * dim // 8),
        _sincos(rows, space, 3 * dim // 8),
    )


def _sincos(count: int, scale: float, dim: int) -> torch.Tensor:
    positions = torch.arange(count, dtype=torch.float32, device="cpu") / scale
    frequencies = THETA ** -(torch.arange(dim // 2, dtype=torch.float64, device="cpu") / (dim / 2))
    angles = torch.outer(positions.double(), frequencies)
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def sincos_table(config: CogVideoXTransformer3DConfig, grid: tuple[int, int, int]) -> torch.Tensor:
    """The positions of all tokens of a grid, `[F·h·w, C]`, in float64 on the CPU."""
    times, columns, rows = sincos_axes(config, grid)
    parts = [times[:, None, None], columns[None, None, :], rows[None, :, None]]
    return torch.cat([part.expand(*grid, -1) for part in parts], dim=-1).flatten(0, 2)


def add_sincos(x_BFhwC: torch.Tensor, config: CogVideoXTransformer3DConfig) -> None:
    """Add positions to tokens `[B, F, h, w, C]` in place, without making the table of all positions."""
    _, frames, rows, columns, dim = x_BFhwC.shape
    times, across, down = sincos_axes(config, (frames, rows, columns))
    first, second = dim // 4, dim // 4 + 3 * dim // 8
    parts = (slice(0, first), slice(first, second), slice(second, dim))
    tables = (times[:, None, None], across[None, None, :], down[None, :, None])
    for part, table in zip(parts, tables, strict=True):
        x_BFhwC[..., part].add_(table.to(x_BFhwC.device, x_BFhwC.dtype))
