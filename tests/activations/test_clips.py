"""Clips row by row: the published decode itself, whatever the rows rest in; tiles of the right size; slices."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests import tiny
from tests.activations import clips
from tests.activations.quality import psnr, worst
from tests.activations.recorded_once import recorded_once  # noqa: F401
from tests.memory.cases import RULES, all_at_rest, put
from tests.thinned import covering, only, thinned
from torch import nn

from lowtide import apply_row_streaming
from lowtide.activations.frame_cache import FrameCache, frame_batches
from lowtide.activations.row_streaming import row_streaming_of
from lowtide.activations.steps import Convolution
from lowtide.memory import detach
from lowtide.memory.rule import Tier
from lowtide.ops.convolution import conv3d
from lowtide.ops.statistics import ChannelStatistics

LEAST_PSNR, MOST_ERROR = 120, 1e-4


@pytest.fixture(autouse=True)
def _without_gradients():
    with torch.no_grad():
        yield


def small():
    """Two levels instead of four, with frames and rows halved once: much the same in a fraction of the time."""
    return clips.vae("frames never halved", temporal_compression_ratio=2, latent_channels=4)


def work_of(model):
    """Bytes at work of which a map takes several bands."""
    return 8_000 if model.config.scale == 2 else 40_000


def whole_and_exact(model, z, x, **options):
    whole = model.decode(z).sample, model.encode(x).latent_dist.mean
    model.enable_tiling("exact", **{"work": work_of(model), **options})
    return whole, (model.decode(z).sample, model.encode(x).latent_dist.mean)


@pytest.mark.parametrize(("kind", "count"), thinned(clips.CONFIGS, [1, 2, 3, 4, 5, 7], most=3))
def test_the_result_is_the_published_one(kind, count):
    model = clips.vae(kind)
    z, x = clips.latents(model, count, (2, 3)), clips.clip(model, 4 * count - 3, (2, 3))
    for whole, exact in zip(*whole_and_exact(model, z, x), strict=True):
        assert exact.shape == whole.shape
        assert psnr(exact, whole) >= LEAST_PSNR
        assert worst(exact, whole) <= MOST_ERROR


@pytest.mark.parametrize("size", [(1, 1), (1, 6), (7, 1), (9, 4)])
def test_any_size(size):
    model = small()
    results = whole_and_exact(model, clips.latents(model, 5, size), clips.clip(model, 9, size))
    for whole, exact in zip(*results, strict=True):
        assert worst(exact, whole) <= MOST_ERROR


def test_a_batch_of_frames_as_large_as_the_clip_has_its_statistics():
    model = small()
    model.num_latent_frames_batch_size, model.num_sample_frames_batch_size = 100, 400
    z, x = clips.latents(model, 7, (3, 4)), clips.clip(model, 13, (3, 4))
    for whole, exact in zip(*whole_and_exact(model, z, x), strict=True):
        assert worst(exact, whole) <= MOST_ERROR


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes_are_as_near_to_the_truth_as_the_whole_clip(dtype):
    model = small().double()
    z, x = clips.latents(model, size=(3, 4)).double(), clips.clip(model, 9, (3, 4)).double()
    truth = model.decode(z).sample, model.encode(x).latent_dist.mean
    whole, exact = whole_and_exact(model.to(dtype), z.to(dtype), x.to(dtype))
    for true, one, other in zip(truth, whole, exact, strict=True):
        assert other.dtype == dtype
        limit = 1e-12 if dtype == torch.float64 else 1.5 * float((one - true).abs().mean())
        assert float((other - true).abs().mean()) <= limit


def test_where_rows_rest_changes_no_bit():
    model = small()
    z, x = clips.latents(model, 5, (3, 4)), clips.clip(model, 17, (3, 4))
    first = whole_and_exact(model, z, x, rows="device")[1]
    for rows in ("disk", "device"):
        model.enable_tiling("exact", rows=rows, work=work_of(model))
        assert torch.equal(model.decode(z).sample, first[0])
        assert torch.equal(model.encode(x).latent_dist.mean, first[1])


@pytest.fixture(scope="module")
def resident():
    """A clip's latents and frames, and what the resident model makes of both: as a whole, and by rows."""
    model = small()
    z, x = clips.latents(model, 4, (2, 3)), clips.clip(model, 9, (2, 3))
    with torch.no_grad():
        return z, x, *whole_and_exact(model, z, x)


@pytest.mark.parametrize("zero_copy", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize("rule", only(RULES, "sequential", "blocks ahead", "half on the host"))
def test_equal_under_every_residency(resident, rule, zero_copy):
    model, (z, x, plain, streamed) = small(), resident
    model.enable_tiling("exact", work=work_of(model))
    attachment = put(model, RULES[rule], zero_copy=zero_copy)
    assert torch.equal(model.decode(z).sample, streamed[0])
    assert torch.equal(model.encode(x).latent_dist.mean, streamed[1])
    model.disable_tiling()
    assert torch.equal(model.decode(z).sample, plain[0])
    assert torch.equal(model.encode(x).latent_dist.mean, plain[1])
    parts: list[torch.Tensor] = []
    model.decode_frames(z, lambda _, part: parts.append(part))
    assert torch.equal(torch.cat(parts, dim=2), plain[0])
    assert all_at_rest(attachment)
    assert attachment.stream.ledger.peak <= attachment.bound
    detach(model)


@pytest.mark.parametrize("mode", ["plain", "blended", "exact"])
def test_slices_are_the_clips_alone(mode):
    model = small()
    if mode != "plain":
        model.enable_tiling(mode, **({"work": work_of(model)} if mode == "exact" else {"tile_size": 8}))
    z, x = clips.latents(model, 2, batch=2), clips.clip(model, 3, batch=2)
    model.enable_slicing()
    sliced, encoded = model.decode(z).sample, model.encode(x).latent_dist.mean
    for place in range(2):
        assert torch.equal(sliced[place : place + 1], model.decode(z[place : place + 1]).sample)
        assert torch.equal(encoded[place : place + 1], model.encode(x[place : place + 1]).latent_dist.mean)
    model.disable_slicing()
    assert worst(model.decode(z).sample, sliced) <= MOST_ERROR


@pytest.mark.parametrize("mode", ["plain", "exact", "blended"])
def test_finished_frames_come_in_order_and_none_twice(mode):
    model = small()
    if mode != "plain":
        model.enable_tiling(mode, **({"work": work_of(model)} if mode == "exact" else {"tile_size": 8}))
    z = clips.latents(model, 7, (3, 5))
    whole, seen = model.decode(z).sample, []
    model.decode_frames(z, lambda first, part: seen.append((first, part)))
    starts = [first for first, _ in seen]
    assert starts == ([0] if mode == "blended" else [0, 5, 9])
    assert torch.equal(torch.cat([part for _, part in seen], dim=2), whole)


@pytest.mark.parametrize(
    ("batch", "work", "rows"), covering(["first", "middle", "last", "only"], [10_000, 100_000], ["device", "disk"])
)
def test_the_forecast_holds_and_is_near(batch, work, rows):
    model = small()
    streaming = apply_row_streaming(model.decoder, rows=rows, work=work)
    cache = FrameCache()
    z = clips.latents(model, 2, (24, 20))
    if batch in ("middle", "last"):
        cache.begin(is_last=False)
        model.decoder(z, cache)
    cache.begin(is_last=batch in ("last", "only"))
    forecast = streaming.forecast(tuple(z.shape), None, cache)
    model.decoder(z, cache)
    assert streaming.last.stored <= forecast.stored
    assert forecast.stored <= 1.6 * streaming.last.stored
    least = 24 * 12 * 10 * 80
    assert forecast.work <= max(work, least)
    model.check_decoding((1, 4, 7, 24, 20))


def test_a_budget_that_is_too_small_is_told_before_the_work():
    model = clips.vae()
    model.enable_tiling("exact", budget=1000)
    with pytest.raises(ValueError, match=r"budget=1.0 kB is too small .* one row of it at work takes"):
        model.check_decoding((1, 4, 5, 6, 8))


def test_frames_that_are_kept_are_those_of_one_clip():
    model = clips.vae()
    model.enable_tiling("exact", work=work_of(model))
    with pytest.raises(ValueError, match="a batch of 2: decode one at a time"):
        model.decode_frames(clips.latents(model, 3, batch=2), lambda first, part: None)


def test_only_the_last_frames_are_alive_between_batches():
    """After the last batch nothing is kept, and before it two frames of each causal convolution's input."""
    model, cache = clips.vae(), FrameCache()
    z = clips.latents(model, 2)
    cache.begin(is_last=False)
    model.decoder(z, cache)
    assert {part.shape[2] for part in cache._frames.values()} == {2}
    cache.begin(is_last=True)
    model.decoder(z, cache)
    assert not cache._frames


class Frames(nn.Module):
    """Somebody else's network over clips, with zeros around in time as well."""

    def __init__(self):
        super().__init__()
        self.one = nn.Conv3d(3, 8, (3, 5, 3), padding="same")
        self.norm = nn.GroupNorm(2, 8)
        self.two = nn.Conv3d(8, 4, 3, stride=(1, 2, 2), padding=1)
        self.up = nn.Upsample(scale_factor=(1, 2, 2))
        self.three = nn.Conv3d(4, 5, 1, groups=1)
        self.four = nn.Conv3d(5, 5, 3, padding=1, groups=5)

    def forward(self, x):
        return self.four(self.three(self.up(self.two(torch.relu(self.norm(self.one(x)))))).sigmoid())


@pytest.mark.parametrize("work", [1, 30_000, None])
def test_another_network_over_clips(work):
    module = tiny.set_weights(Frames())
    x = tiny.numbers((2, 3, 4, 20, 12))
    whole = module(x)
    apply_row_streaming(module, work=work)
    assert psnr(module(x), whole) >= LEAST_PSNR


SIZES = {"cuda": (5, (5, 7)), "sim": (2, (2, 3))}
"""Latent frames, rows and columns on an accelerator; the stand-in computes on the CPU."""


@pytest.mark.parametrize("rows", ["device", pytest.param("host", marks=pytest.mark.slow), "disk"])
def test_on_an_accelerator(rows, monkeypatch, device):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    (frames, size), model = SIZES[device.type], small().to(device)
    z, x = clips.latents(model, frames, size).to(device), clips.clip(model, 2 * frames - 1, size).to(device)
    for whole, exact in zip(*whole_and_exact(model, z, x, rows=rows), strict=True):
        assert exact.device == device
        assert psnr(exact, whole) >= LEAST_PSNR


def test_rows_of_a_clip_rest_where_its_largest_batch_has_room():
    model = small()
    z = clips.latents(model, 6, (5, 6))
    model.enable_tiling("exact", work=work_of(model))
    streaming, peaks = row_streaming_of(model.decoder), []
    for has_before, is_last in ((False, False), (True, False), (True, True)):
        cache = FrameCache()
        cache.has_before, cache.is_last = has_before, is_last
        peaks.append(streaming.forecast((1, 4, 2, 5, 6), None, cache).peak)
    assert peaks[1] == max(peaks) > peaks[0]
    whole = model.decode(z).sample
    model.enable_tiling("exact", work=work_of(model), budget=(peaks[0] + peaks[1]) // 2)
    places = []
    row_streaming_of(model.decoder).watch = lambda _: None
    model.decode_frames(z, lambda first, part: places.append((part, row_streaming_of(model.decoder))))
    assert torch.equal(torch.cat([part for part, _ in places], dim=2), whole)
    assert row_streaming_of(model.decoder).last.rows is Tier.DISK
    assert row_streaming_of(model.decoder).last.peak <= (peaks[0] + peaks[1]) // 2


def test_thin_bands_take_no_more_than_was_forecast():
    """PyTorch's other kernel for few entries would write every one down 27 times."""
    x = tiny.numbers((1, 16, 4, 3, 40)).contiguous(memory_format=torch.channels_last_3d)
    weight, bias = tiny.numbers((8, 16, 3, 3, 3)) / 20, tiny.numbers((8,))
    expected = torch.nn.functional.conv3d(x.double(), weight.double(), bias.double(), padding=(0, 1, 1))
    with torch.profiler.profile() as profile:
        found = conv3d(x, weight, bias, (1, 1, 1), (0, 1, 1), (1, 1, 1), 1)
    assert worst(found, expected) <= 1e-6
    assert not any("slow_conv" in event.key for event in profile.key_averages())


def test_frames_given_by_keyword():
    model = small()
    z = clips.latents(model, 5, (3, 4))
    whole = model.decode(z).sample
    model.enable_tiling("exact", work=work_of(model))
    cache, parts = FrameCache(), []
    for batch in frame_batches(5, 2):
        cache.begin(is_last=batch.stop >= 5)
        parts.append(model.decoder(z[:, :, batch], cache=cache))
    assert worst(torch.cat(parts, dim=2), whole) <= MOST_ERROR


def test_training_is_refused_where_nothing_is_kept_for_gradients():
    model = clips.vae().train()
    model.requires_grad_(True)
    model.enable_tiling("exact")
    with torch.enable_grad(), pytest.raises(ValueError, match="keeps nothing for gradients"):
        model.decode(clips.latents(model, 1))


@pytest.mark.parametrize("size", [0, -1, 2.5, None, True])
def test_batches_of_frames_that_are_not_possible(size):
    model = clips.vae()
    model.num_latent_frames_batch_size = size
    with pytest.raises(ValueError, match="at a time: give a whole number of at least 1"):
        model.decode(clips.latents(model, 3))
    with pytest.raises(ValueError, match="at least one frame"):
        list(frame_batches(0, 2))


def test_pixels_beyond_whole_latents_are_no_tile():
    model = clips.vae()
    model.enable_tiling(tile_size=(16, 24))
    assert model.encode(tiny.numbers((1, 3, 9, 22, 60))).latent_dist.mean.shape == (1, 4, 3, 2, 7)


# ---- negative controls


def test_statistics_of_a_part_would_be_seen(monkeypatch):
    model = small()
    z, x = clips.latents(model, 4, (3, 4)), clips.clip(model, 7, (3, 4))
    added = ChannelStatistics.add
    monkeypatch.setattr(ChannelStatistics, "add", lambda self, part: self.count or added(self, part))
    for whole, exact in zip(*whole_and_exact(model, z, x), strict=True):
        assert worst(exact, whole) > 1e-3


def test_a_missing_halo_would_be_seen(monkeypatch):
    model = small()
    z, x = clips.latents(model, 4, (3, 4)), clips.clip(model, 7, (3, 4))
    reach = Convolution.needs

    def cut(self, span):
        (first, end) = reach(self, span)[0]
        rows = self.inputs[0].rows
        return [(first, end - 1 if end <= rows else end)]

    model.enable_tiling("exact", work=work_of(model))
    monkeypatch.setattr(Convolution, "needs", cut)
    with pytest.raises((AssertionError, RuntimeError)):
        assert worst(model.decode(z).sample, small().decode(z).sample) <= MOST_ERROR
    with pytest.raises((AssertionError, RuntimeError)):
        assert worst(model.encode(x).latent_dist.mean, small().encode(x).latent_dist.mean) <= MOST_ERROR


def test_frames_forgotten_would_be_seen(monkeypatch):
    model = small()
    z = clips.latents(model, 4, (3, 4))
    whole = model.decode(z).sample
    model.enable_tiling("exact", work=work_of(model))
    monkeypatch.setattr(FrameCache, "begin", lambda self, *, is_last: setattr(self, "is_last", is_last))
    assert worst(model.decode(z).sample, whole) > 1e-3


# ---- sizes


@given(st.integers(1, 60), st.integers(1, 20))
def test_batches_cover_every_frame_once(count, size):
    spans = list(frame_batches(count, size))
    assert [place for span in spans for place in range(count)[span]] == list(range(count))
    assert all(span.stop - span.start == size for span in spans[1:])
    assert len(spans) == max(count // size, 1)


@settings(max_examples=8, deadline=None)
@given(st.integers(1, 7), st.integers(1, 7), st.integers(8, 40), st.floats(0, 0.7), st.integers(1, 3))
def test_the_right_size_for_any_tiles(rows, columns, tile, overlap, count):
    model = clips.vae("frames halved once")
    model.enable_tiling(tile_size=tile, overlap=overlap)
    scale = model.config.scale
    with torch.no_grad():
        out = model.decode(clips.latents(model, count, (rows, columns))).sample
        back = model.encode(clips.clip(model, count, (rows, columns))).latent_dist.mean
    assert out.shape[3:] == (rows * scale, columns * scale)
    assert back.shape[3:] == (rows, columns)
    assert row_streaming_of(model.decoder) is None
