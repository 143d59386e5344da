"""Row streaming: the whole network's result, whatever the rows rest in, and nothing left behind."""

from __future__ import annotations

import copy
import os
import pickle
from collections import namedtuple

import pytest
import torch
from tests import tiny
from tests.activations.quality import psnr, worst
from tests.activations.recorded_once import recorded_once  # noqa: F401
from tests.memory.cases import RULES, all_at_rest, put
from tests.thinned import covering, only, thinned

from lowtide import apply_row_streaming, remove_row_streaming
from lowtide.activations import row_settings, row_streaming
from lowtide.activations.row_streaming import RowSettings, RowStreaming, row_streaming_of
from lowtide.memory import detach
from lowtide.memory.rule import Tier
from lowtide.ops.statistics import ChannelStatistics

LEAST_PSNR, MOST_ERROR = 120, 1e-4
SIZES = [(1, 1), (1, 9), (7, 1), (8, 8), (13, 11)]


@pytest.fixture(autouse=True)
def _without_gradients():
    with torch.no_grad():
        yield


def part_and_input(kind, part, size=(13, 11), batch=1):
    """An encoder or a decoder, and something for it."""
    model = tiny.vae(kind)
    if part == "decoder":
        return model.decoder, tiny.numbers((batch, model.config.latent_channels, *size), 3) * 1.7
    return model.encoder, tiny.numbers((batch, 3, *(side * model.config.scale for side in size)), 3)


def streamed(module, x, **options):
    apply_row_streaming(module, **options)
    try:
        return module(x)
    finally:
        remove_row_streaming(module)


def check(ours, whole):
    assert ours.shape == whole.shape
    assert ours.dtype == whole.dtype
    assert psnr(ours, whole) >= LEAST_PSNR
    assert worst(ours, whole) <= MOST_ERROR


@pytest.mark.parametrize(("part", "kind", "size"), thinned(["encoder", "decoder"], tiny.VAES, SIZES))
def test_the_result_is_the_whole_one(kind, part, size):
    module, x = part_and_input(kind, part, size)
    whole = module(x)
    for work in (1, 20_000, None):
        check(streamed(module, x, work=work), whole)
    assert torch.equal(module(x), whole), "undone"


@pytest.mark.parametrize("part", ["encoder", "decoder"])
def test_where_rows_rest_changes_no_bit_and_a_second_run_neither(part):
    module, x = part_and_input("four levels", part, (7, 6))
    one = streamed(module, x, rows="device", work=20_000)
    for rows in ("device", "host", "disk"):
        assert torch.equal(streamed(module, x, rows=rows, work=20_000), one)


def test_a_batch_is_its_pictures():
    module, x = part_and_input("sd1", "decoder", batch=3)
    together = streamed(module, x, work=20_000)
    assert torch.equal(together, torch.cat([streamed(module, one, work=20_000) for one in x.split(1)]))
    check(together, module(x))


@pytest.mark.parametrize(
    ("part", "dtype"), covering(["encoder", "decoder"], [torch.bfloat16, torch.float16, torch.float64])
)
def test_other_dtypes_are_as_near_to_the_truth_as_the_whole_network(part, dtype):
    module, x = part_and_input("four levels", part, (16, 16))
    truth = module.double()(x.double())
    module.to(dtype)
    ours, whole = streamed(module, x.to(dtype), work=30_000), module(x.to(dtype))
    assert ours.dtype == dtype
    error, whole_error = (float((one.double() - truth).square().mean().sqrt()) for one in (ours, whole))
    assert error <= (1e-14 if dtype == torch.float64 else whole_error * 1.01)


def test_statistics_of_a_part_would_be_seen(monkeypatch):
    """Negative control: norms that take the first band for the whole map, as tiles do."""
    module, x = part_and_input("sd1", "decoder")
    whole, add = module(x), ChannelStatistics.add
    monkeypatch.setattr(ChannelStatistics, "add", lambda self, part: None if self.count else add(self, part))
    found = streamed(module, x, work=10_000)
    assert psnr(found, whole) < LEAST_PSNR / 2
    assert worst(found, whole) > MOST_ERROR * 10


def test_a_missing_halo_would_be_seen(monkeypatch):
    """Negative control: the last row that is read for a band is zeros."""
    module, x = part_and_input("sd1", "decoder")
    whole = module(x)
    monkeypatch.setattr(row_streaming.Run, "_read", _without_last_row(row_streaming.Run._read))
    assert psnr(streamed(module, x, work=10_000), whole) < LEAST_PSNR / 2


def _without_last_row(read):
    def reading(self, value, span, *purpose):
        band = read(self, value, span, *purpose)
        if band.ndim == 4:
            band[:, :, -1] = 0
        return band

    return reading


@pytest.fixture(scope="module")
def streamed_resident():
    """Latents, and what a resident model decodes and encodes again, row by row."""
    model, z = tiny.vae(), tiny.numbers((1, 4, 5, 4), 3)
    model.enable_tiling("exact", work=20_000)
    with torch.no_grad():
        resident = model.decode(z).sample
        return z, resident, model.encode(resident).latent_dist.mean


@pytest.mark.parametrize("zero_copy", [pytest.param(True, marks=pytest.mark.slow), False])
@pytest.mark.parametrize("rule", only(RULES, "model", "leaves three ahead", "blocks on the host"))
def test_equal_under_every_residency(streamed_resident, rule, zero_copy):
    """The two rivers meet in the slots alone: where weights rest changes no bit of what is streamed."""
    model, (z, resident, encoded) = tiny.vae(), streamed_resident
    model.enable_tiling("exact", work=20_000)
    attachment = put(model, RULES[rule], zero_copy=zero_copy)
    for _ in range(2):
        rows: list[torch.Tensor] = []
        assert torch.equal(model.decode(z).sample, resident)
        assert torch.equal(model.encode(resident).latent_dist.mean, encoded)
        model.decode_rows(z, lambda _, band, rows=rows: rows.append(band.clone()))
        assert torch.equal(torch.cat(rows, dim=2), resident)
        assert all_at_rest(attachment)
    assert attachment.stream.ledger.peak <= attachment.bound
    detach(model)
    assert torch.equal(model.decode(z).sample, resident)


@pytest.mark.parametrize(
    ("kind", "part", "rows", "work"),
    thinned(["sd1", "four levels"], ["encoder", "decoder"], ["device", "disk"], [5_000, 50_000, 10**7]),
)
def test_the_forecast_holds_and_is_near(kind, part, work, rows):
    module, x = part_and_input(kind, part, (24, 20))
    streaming = apply_row_streaming(module, rows=rows, work=work)
    forecast = streaming.forecast(tuple(x.shape))
    module(x)
    assert streaming.last.stored <= forecast.stored
    if work < 10**6:
        assert forecast.stored <= 1.5 * streaming.last.stored
    assert forecast.work <= max(work, 4 * LEAST_BAND)
    assert streaming.last.rows == forecast.rows == Tier(rows)


def test_many_sizes_leave_the_plans_of_the_last_few():
    module, x = part_and_input("sd1", "decoder", (6, 6))
    before = streamed(module, x, work=20_000)
    streaming = apply_row_streaming(module, work=20_000)
    sizes = [(1, x.shape[1], 4 + number, 5) for number in range(3 * row_streaming.SCHEDULES_KEPT)]
    held = []
    for shape in sizes:
        streaming.forecast(shape)
        held.append(len(pickle.dumps(list(streaming._schedules.values()))))
    assert len(streaming._schedules) == row_streaming.SCHEDULES_KEPT
    assert held[-1] < 1.5 * held[row_streaming.SCHEDULES_KEPT]
    assert torch.equal(module(x), before), "a size that comes back"
    kept = streaming.schedule(x, (), {})
    streaming.forecast(sizes[-1])
    assert streaming.schedule(x, (), {}) is kept, "made once while it is among the last used"


LEAST_BAND = 80 * 192 * 4 * 3
"""Bytes of a row of the widest map and its neighbours."""


def test_rows_go_where_there_is_room():
    module, x = part_and_input("sd1", "decoder", (24, 24))
    shape = tuple(x.shape)
    needed = apply_row_streaming(module, work=20_000).forecast(shape)
    assert needed.rows is Tier.DEVICE
    enough = apply_row_streaming(module, work=20_000, budget=needed.stored + needed.work).forecast(shape)
    assert enough.rows is Tier.DEVICE
    short = apply_row_streaming(module, work=20_000, budget=needed.stored // 2).forecast(shape)
    assert short.rows is Tier.DISK
    assert short.peak <= needed.stored // 2
    apply_row_streaming(module, budget=1000)
    with pytest.raises(ValueError, match=r"budget=1\.0 kB is too small .* one row of it at work takes .* kB\. Give"):
        module(x)
    apply_row_streaming(module, budget=short.peak, rows="device")
    with pytest.raises(ValueError, match=r"too small .* what rests on the device"):
        module(x)
    remove_row_streaming(module)


def test_only_a_small_part_is_alive_on_disk_rows():
    """The band at work is small beside the maps, and what is stored beside all that passes through."""
    module, x = part_and_input("four levels", "decoder", (32, 32))
    forecast = apply_row_streaming(module, rows="disk", work=100_000).forecast(tuple(x.shape))
    widest = 256 * 256 * 8 * 4
    assert forecast.work <= 100_000 < widest / 10
    assert forecast.stored < 2.5 * widest


def test_nothing_is_left_behind(tmp_path):
    module, x = part_and_input("sd1", "decoder")
    files = len(os.listdir("/proc/self/fd"))

    def stop(first, rows):
        raise KeyboardInterrupt

    streaming = apply_row_streaming(module, rows="disk", work=20_000, folder=str(tmp_path))
    with pytest.raises(KeyboardInterrupt):
        streaming.stream(x, stop)
    assert list(tmp_path.iterdir()) == []
    assert len(os.listdir("/proc/self/fd")) == files
    check(module(x), RowStreaming.__call__(streaming, x))


def test_a_full_disk_is_told_before_the_work(monkeypatch, tmp_path):
    module, x = part_and_input("sd1", "decoder")
    monkeypatch.setattr(row_settings.shutil, "disk_usage", lambda _: namedtuple("Usage", "free")(1000))
    apply_row_streaming(module, rows="disk", folder=str(tmp_path))
    calls = []
    monkeypatch.setattr(row_streaming.Run, "__call__", lambda *_: calls.append(1))
    with pytest.raises(OSError, match=r"do not fit in .*free: 1\.0 kB.*another folder"):
        module(x)
    assert calls == []


def test_rows_come_from_top_to_bottom_and_none_twice():
    module, x = part_and_input("sd1", "decoder")
    whole, found, progress = module(x), [], []
    streaming = apply_row_streaming(module, work=20_000)
    streaming.watch = lambda now: progress.append((now.done, now.total))
    streaming.stream(x, lambda first, rows: found.append((first, rows)))
    assert [first for first, _ in found] == [sum(rows.shape[2] for _, rows in found[:i]) for i in range(len(found))]
    assert len(found) > 3
    check(torch.cat([rows for _, rows in found], dim=2).contiguous(), whole)
    total = progress[-1][1]
    assert progress == [(done, total) for done in range(1, total + 1)]


def test_copies_and_pickles_stream_on_their_own():
    module, x = part_and_input("sd1", "decoder")
    apply_row_streaming(module, work=20_000)
    one = module(x)
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert row_streaming_of(twin) is not row_streaming_of(module)
        assert row_streaming_of(twin).module is twin
        assert torch.equal(twin(x), one)
        remove_row_streaming(twin)
        assert row_streaming_of(module) is not None
    state = module.state_dict()
    remove_row_streaming(module)
    assert state.keys() == module.state_dict().keys()
    assert "forward" not in module.__dict__


def test_changed_weights_are_seen():
    module, x = part_and_input("sd1", "decoder")
    apply_row_streaming(module, work=20_000)
    module(x)
    for parameter in module.parameters():
        parameter.mul_(1.01)
    ours = module(x)
    remove_row_streaming(module)
    check(ours, module(x))


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"rows": "tape"}, "device"),
        ({"work": "much"}, "not a size"),
        ({"budget": -1}, "negative"),
        ({"work": True}, "not a size"),
        ({"folder": "/nowhere"}, "give an existing folder that can be written to"),
        ({"folder": __file__}, "give an existing folder that can be written to"),
        ({"folder": 5}, "give an existing folder that can be written to"),
    ],
)
def test_settings_that_are_not_possible(options, told):
    module, _ = part_and_input("sd1", "decoder")
    with pytest.raises(ValueError, match=told):
        apply_row_streaming(module, **options)
    assert row_streaming_of(module) is None


def test_inputs_that_are_not_possible():
    module, x = part_and_input("sd1", "decoder")
    apply_row_streaming(module)
    with pytest.raises(ValueError, match=r"\[B, C, F, H, W\], and this is \[4, 13, 11\]"):
        module(x[0])
    with pytest.raises(ValueError, match="this is a NoneType"):
        module(None)
    with pytest.raises(TypeError, match=r"for a torch\.nn\.Module, not for a Tensor"):
        apply_row_streaming(x)
    with pytest.raises(ValueError, match="no picture"):
        module(x[:0])
    with torch.enable_grad(), pytest.raises(ValueError, match=r"no_grad"):
        module(x.clone().requires_grad_())
    with pytest.raises(ValueError, match="no other tensors"):
        module(x, x)


def test_somebody_elses_forward_is_not_replaced():
    module, _ = part_and_input("sd1", "decoder")
    module.forward = lambda x: x
    with pytest.raises(ValueError, match="replaced by somebody else"):
        apply_row_streaming(module)


LARGE = {"cuda": (24, 20), "sim": (4, 3)}
"""Rows and columns of latents on an accelerator; the stand-in computes on the CPU."""


@pytest.mark.parametrize(("part", "rows"), thinned(["encoder", "decoder"], ["device", "host", "disk"]))
def test_on_an_accelerator(part, rows, monkeypatch, device):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    module, x = part_and_input("four levels", part, LARGE[device.type])
    module, x = module.to(device), x.to(device)
    found = streamed(module, x, rows=rows, work=50_000)
    assert found.device == x.device
    check(found, module(x))
    assert torch.equal(streamed(module, x, rows="device", work=50_000), found)


def test_sizes_may_be_written_as_people_do():
    assert RowSettings.of("disk", "1GB", "8MiB") == RowSettings(Tier.DISK, 10**9, 8 * 2**20)
