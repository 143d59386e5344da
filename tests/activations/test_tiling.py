"""Blended tiles and slices: the right size always, the peer's numbers where the peer is right, little memory."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests import tiny
from tests.activations.quality import psnr, worst
from tests.memory_peaks import peak_bytes
from tests.parity import pairs
from tests.thinned import thinned

from lowtide.activations.tiling import Tiles, blended, gathered, sliced


@pytest.fixture(autouse=True)
def _without_gradients():
    with torch.no_grad():
        yield


def inputs(model, rows, columns, batch=2):
    scale = model.config.scale
    return tiny.numbers((batch, 4, rows, columns), 3), tiny.numbers((batch, 3, rows * scale, columns * scale), 5)


SIZES = [(4, 4), (5, 4), (7, 8), (16, 4), (13, 29), (3, 40)]


@pytest.mark.parity
@pytest.mark.parametrize(("size", "slicing"), thinned(SIZES, [False, True]))
def test_equal_to_the_peer(size, slicing):
    pytest.importorskip("diffusers")
    ours, theirs = pairs.vaes("four levels")
    for model in (ours, theirs):
        model.enable_tiling()
        if slicing:
            model.enable_slicing()
    z, x = inputs(ours, *size)
    assert tiny.difference(ours.decode(z).sample, theirs.decode(z).sample) <= 1e-5
    assert tiny.difference(ours.encode(x).latent_dist.mean, theirs.encode(x).latent_dist.mean) <= 1e-5


@pytest.mark.parity
def test_the_comparison_sees_another_overlap():
    """Negative control."""
    pytest.importorskip("diffusers")
    ours, theirs = pairs.vaes("four levels")
    z, _ = inputs(ours, 13, 29)
    ours.enable_tiling(overlap=0.5)
    theirs.enable_tiling()
    assert tiny.difference(ours.decode(z).sample, theirs.decode(z).sample) > 1e-3


@settings(max_examples=20)
@given(
    st.integers(1, 40),
    st.integers(1, 40),
    st.tuples(st.integers(8, 100), st.integers(8, 100)),
    st.tuples(st.floats(0, 0.9), st.floats(0, 0.9)),
)
def test_the_right_size_for_any_tiles(rows, columns, tile, overlap):
    """Also where the overlap is no whole number of latents, a tile has one latent, or one side fits in a tile."""
    with torch.no_grad():
        model = tiny.vae(block_out_channels=[4, 4, 4], norm_num_groups=2, mid_block_add_attention=False)
        steps = Tiles(*tile, *overlap).in_latents(model.config.scale)[1]
        if rows * columns > 30 * steps[0] * steps[1]:
            return  # slow, and no other case
        z, x = inputs(model, rows, columns, batch=1)
        model.enable_tiling(tile_size=tile, overlap=overlap)
        assert model.decode(z).sample.shape == x.shape
        assert model.encode(x).latent_dist.mean.shape == z.shape


@settings(max_examples=40)
@given(st.integers(1, 30), st.integers(1, 30), st.integers(1, 9), st.floats(0, 0.9), st.integers(1, 3))
def test_tiles_of_a_function_of_single_pixels_change_nothing(rows, columns, side, overlap, scale):
    """Every pixel comes from its own place, once: the weights of a fade add up to one."""

    def enlarge(x):
        return torch.nn.functional.interpolate(x * 2 + 1, scale_factor=scale)

    x = tiny.numbers((1, 2, rows, columns), 3)
    sides, steps = Tiles(side, side, overlap, overlap).in_latents(1)
    kept = (steps[0] * scale, steps[1] * scale)
    found = gathered(lambda write: blended(enlarge, x, sides, steps, kept, write), rows * scale)
    assert torch.allclose(found, enlarge(x), atol=1e-5)


def test_off_up_to_one_tile_and_undone():
    model = tiny.vae("four levels")
    model.enable_tiling()
    small, _ = inputs(model, 4, 4)
    large, _ = inputs(model, 9, 9)
    tiled = model.decode(large).sample
    one = model.decode(small).sample
    model.disable_tiling()
    assert torch.equal(model.decode(small).sample, one)
    whole = model.decode(large).sample
    assert psnr(tiled, whole) < 60, "tiles are another picture"
    model.enable_tiling("exact")
    model.enable_tiling()
    assert torch.equal(model.decode(large).sample, tiled), "the last one counts"


@pytest.mark.parametrize("mode", [None, "blended", "exact"])
def test_slices_are_the_pictures_alone(mode):
    model = tiny.vae("four levels")
    z, x = inputs(model, 9, 7, batch=3)
    if mode is not None:
        model.enable_tiling(mode)
    together = model.decode(z).sample, model.encode(x).latent_dist.mean
    model.enable_slicing()
    found = model.decode(z).sample, model.encode(x).latent_dist.mean
    calls = zip(_calls(model), (z, x), strict=True)
    alone = [torch.cat([one(part) for part in whole.split(1)]) for one, whole in calls]
    for sliced_, single, batch in zip(found, alone, together, strict=True):
        assert torch.equal(sliced_, single)
        assert worst(sliced_, batch) < 1e-5
    model.disable_slicing()
    assert torch.equal(model.decode(z).sample, together[0])


def _calls(model):
    return (lambda z: model.decode(z).sample), (lambda x: model.encode(x).latent_dist.mean)


def test_slicing_holds_one_picture_and_the_output():
    """The output is made once, and not joined from parts at the end."""
    model = tiny.vae("four levels", block_out_channels=[4, 4, 4, 4])
    z, _ = inputs(model, 16, 16, batch=8)
    output = 8 * 3 * 128 * 128 * 4
    model.decode(z)
    one = peak_bytes(lambda: model.decode(z[:1]))
    together = peak_bytes(lambda: model.decode(z))
    model.enable_slicing()
    assert peak_bytes(lambda: model.decode(z)) <= one + output
    assert one + output < together / 2, "a control: the bound is far below what it takes without slices"
    assert peak_bytes(lambda: torch.cat([sliced(lambda x: x * 1, z), z])) > 0


def test_tiles_hold_few_tiles():
    model = tiny.vae("four levels", block_out_channels=[4, 4, 4, 4])
    z, _ = inputs(model, 48, 48, batch=1)
    whole = peak_bytes(lambda: model.decode(z))
    model.enable_tiling(tile_size=64)
    tiled = peak_bytes(lambda: model.decode(z))
    assert tiled < whole / 4
    rows = []
    streamed = peak_bytes(lambda: model.decode_rows(z, lambda first, band: rows.append((first, band.shape[2]))))
    assert streamed <= tiled - 3 * 384 * 384 * 4 * 0.8, "the output is never held"
    assert rows == [(48 * i, 48) for i in range(8)]


def test_decoded_rows_are_the_picture():
    model = tiny.vae("four levels")
    z, _ = inputs(model, 9, 13, batch=1)
    for mode, options in itertools.chain([(None, {})], [("blended", {}), ("exact", {"work": 20_000})]):
        model.disable_tiling()
        if mode is not None:
            model.enable_tiling(mode, **options)
        rows: list[tuple[int, torch.Tensor]] = []
        model.decode_rows(z, lambda first, band, rows=rows: rows.append((first, band.clone())))
        assert [first for first, _ in rows] == list(itertools.accumulate([0, *(b.shape[2] for _, b in rows)]))[:-1]
        assert torch.equal(torch.cat([band for _, band in rows], dim=2), model.decode(z).sample)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"mode": "tiles"}, "one of blended, exact"),
        ({"tile_size": 0}, "at least one pixel"),
        ({"tile_size": (64, -8)}, "at least one pixel"),
        ({"tile_size": (1, 2, 3)}, "height and width"),
        ({"tile_size": 64.5}, "a whole number"),
        ({"tile_size": "64"}, "a whole number"),
        ({"tile_size": True}, "a whole number"),
        ({"overlap": "a"}, "below 1"),
        ({"overlap": 1}, "below 1"),
        ({"overlap": -0.1}, "below 1"),
        ({"rows": "disk"}, "rows cannot be set"),
        ({"mode": "exact", "tile_size": 64}, "tile_size cannot be set"),
        ({"mode": "exact", "rows": "tape"}, "device"),
    ],
)
def test_settings_that_are_not_possible_change_nothing(options, told):
    model = tiny.vae()
    model.enable_tiling(tile_size=24)
    with pytest.raises(ValueError, match=told):
        model.enable_tiling(**options)
    assert model.tiles == Tiles(24, 24)
