"""The feed-forward of the video transformer in chunks of tokens: the same bits whatever the chunk, in less memory."""

import pytest
import torch
import torch.nn.functional as F
from tests import tiny
from tests.memory.cases import RULES, put
from tests.thinned import thinned
from torch.profiler import ProfilerActivity, profile

from lowtide.casting.apply_casting import apply_casting, named_casting
from lowtide.models import video_layers
from lowtide.models.video_layers import GROUP, VideoFeedForward

DTYPES = [torch.float32, torch.bfloat16]
SIZES = [1, 7, GROUP - 1, GROUP, GROUP + 1, 2 * GROUP - 1, 2 * GROUP, 2 * GROUP + 3, 5 * GROUP + 17]


def feed_forward(width, dtype):
    return tiny.set_weights(VideoFeedForward(width)).to(dtype)


def outputs(layer, x):
    """Of every chunk size, the largest first."""
    found = []
    for size in (None, 4 * GROUP, 3 * GROUP, 2 * GROUP, GROUP):
        layer.chunk_size = size
        found.append(layer(x))
    return found


@pytest.mark.parametrize(("width", "tokens", "dtype"), thinned([32, 66], SIZES, DTYPES))
@torch.no_grad()
def test_every_chunk_size_gives_the_same_bits(width, tokens, dtype):
    layer, x = feed_forward(width, dtype), tiny.numbers((tokens, width)).to(dtype)
    first, *others = outputs(layer, x[None])
    assert all(torch.equal(first, other) for other in others)
    if tokens % 3 == 0:
        assert all(torch.equal(first.view(3, -1, width), other) for other in outputs(layer, x.view(3, -1, width)))
    exact = F.linear(F.gelu(layer.net[0].proj(x), approximate="tanh"), layer.net[2].weight, layer.net[2].bias)
    assert tiny.difference(first[0], exact) < (1e-5 if dtype == torch.float32 else 0.02)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1920, 3072])
@pytest.mark.parametrize("threads", [1, 2])
@torch.no_grad()
def test_published_widths(width, dtype, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        layer, x = feed_forward(width, dtype), tiny.numbers((2, GROUP + 300, width)).to(dtype)
        first, *others = outputs(layer, x)
        assert all(torch.equal(first, other) for other in others)
    finally:
        torch.set_num_threads(before)


@torch.no_grad()
def test_one_wrong_bit_would_be_seen():
    """Negative control."""
    layer, x = feed_forward(32, torch.float32), tiny.numbers((1, 3 * GROUP, 32))
    expected = layer(x)
    bias = layer.net[2].bias
    bias[0] = torch.nextafter(bias[0], torch.tensor(torch.inf))
    assert not torch.equal(layer(x), expected)


@torch.no_grad()
def test_products_have_the_same_sizes_whatever_the_chunk():
    """The reason for the same bits; and a negative control: chunks as they come would not have it."""
    layer, x = feed_forward(32, torch.float32), tiny.numbers((3, GROUP + 100, 32))
    seen = []
    for linear in (layer.net[0].proj, layer.net[2]):
        linear.register_forward_pre_hook(lambda module, inputs: seen.append((module.in_features, len(inputs[0]))))
    found = []
    for size in (None, 2 * GROUP, GROUP):
        layer.chunk_size = size
        seen.clear()
        layer(x)
        found.append(sorted(seen))
    assert found[0] == found[1] == found[2]
    assert {rows for _, rows in found[0]} == {GROUP, GROUP + 300}
    plain = sorted((width, len(part)) for width in (32, 128) for part in x.flatten(0, 1).split(2 * GROUP))
    assert plain != found[0]


@torch.no_grad()
def test_chunks_as_they_come_do_not_give_the_same_bits():
    """Negative control: of the short chunks there is one that differs, unless this processor adds in one order only."""
    layer, x = feed_forward(66, torch.float32), tiny.numbers((1000, 66))
    whole = layer(x)
    differ = [n for n in range(1, 40) if not torch.equal(torch.cat([layer(part) for part in x.split(n)]), whole)]
    if not differ:
        pytest.skip("this processor gives the same bits for products of any size")


def test_peak_memory():
    """Beside its input and output, four times the width of one group, before and after its activation."""
    width, groups = 64, 8
    layer, x = feed_forward(width, torch.float32), tiny.numbers((1, groups * GROUP, width))
    peaks = {}
    for size in (None, GROUP):
        layer.chunk_size = size
        with torch.no_grad():
            layer(x[:, : 2 * GROUP])
            peaks[size] = peak_of(lambda: layer(x))
    unit = 4 * GROUP * width * 4
    assert peaks[GROUP] < x.nbytes + 3.2 * unit
    assert peaks[None] > x.nbytes + groups * unit  # a control


def peak_of(call):
    """Bytes allocated at once, at most, from the profiler's events."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        call()
    assert seen.profiler is not None
    events = [event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
    in_use = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        in_use += event.nbytes()
        most = max(most, in_use)
    return most


@pytest.fixture
def small_groups(monkeypatch):
    monkeypatch.setattr(video_layers, "GROUP", 16)
    monkeypatch.setattr("lowtide.models.video_transformer.GROUP", 16)


@pytest.mark.usefixtures("small_groups")
@pytest.mark.parametrize("dtype", DTYPES)
@torch.no_grad()
def test_a_model_switches_all_its_feed_forwards(dtype):
    model = tiny.video_transformer().to(dtype)
    inputs = {k: v.to(dtype) if k.endswith("states") else v for k, v in tiny.video_inputs().items()}
    feeds = [module for module in model.modules() if isinstance(module, VideoFeedForward)]
    assert len(feeds) == 3
    model.disable_forward_chunking()
    expected = model(**inputs).sample
    assert {feed.chunk_size for feed in feeds} == {None}
    for size in (None, 16, 32, 160):
        model.enable_forward_chunking(size)
        assert {feed.chunk_size for feed in feeds} == {size or 16}
        assert torch.equal(model(**inputs).sample, expected)


def test_chunks_from_the_beginning():
    model = tiny.video_transformer()
    assert {one.chunk_size for one in model.modules() if isinstance(one, VideoFeedForward)} == {GROUP}


@pytest.mark.parametrize("size", [0, -2048, 1, 2047, 2049, 2048.0, True, "2048"])
def test_sizes_that_are_not_possible(size):
    model = tiny.video_transformer()
    with pytest.raises(ValueError, match=r"chunk_size=.* is not possible: it is a multiple of 2048"):
        model.enable_forward_chunking(size)
    assert {one.chunk_size for one in model.modules() if isinstance(one, VideoFeedForward)} == {GROUP}


@pytest.mark.parametrize("dim", [0, 2, -1, None])
def test_axes_that_are_not_possible(dim):
    with pytest.raises(ValueError, match=r"dim=.* is not possible: chunks are made of tokens, dim=1"):
        tiny.video_transformer().enable_forward_chunking(dim=dim)


@pytest.mark.usefixtures("small_groups")
@pytest.mark.parametrize("rule", RULES)
@torch.no_grad()
def test_weights_come_once_a_call_under_every_rule(rule):
    model, inputs = tiny.video_transformer(), tiny.video_inputs()
    model.enable_forward_chunking()
    expected = model(**inputs).sample
    attachment = put(model, RULES[rule], zero_copy=False)
    assert torch.equal(model(**inputs).sample, expected)
    before = attachment.stream.ledger.moved
    assert torch.equal(model(**inputs).sample, expected)
    whole = sum(parameter.nbytes for parameter in model.parameters())
    padding = 256 * len(list(model.parameters()))
    assert attachment.stream.ledger.moved - before <= whole + padding
    assert attachment.stream.ledger.missed == 0
    assert attachment.stream.ledger.peak <= attachment.bound


@pytest.mark.usefixtures("small_groups")
@pytest.mark.parametrize("casting", ["fp8", "int8"])
@torch.no_grad()
def test_cast_weights_are_dequantized_once_a_call(casting, monkeypatch):
    from lowtide.casting.cast_weight import CastWeight

    model, inputs = tiny.video_transformer(), tiny.video_inputs()
    model.enable_forward_chunking()
    rule = named_casting(casting)
    assert rule is not None
    apply_casting(model, rule)
    calls = []
    whole = CastWeight.dequantize_into
    monkeypatch.setattr(CastWeight, "dequantize_into", lambda one, part: (calls.append(one), whole(one, part))[1])
    in_chunks = model(**inputs).sample
    assert len(calls) == len(set(map(id, calls))) == 20
    model.disable_forward_chunking()
    assert torch.equal(model(**inputs).sample, in_chunks)


def test_parts_at_leaf_level():
    """Each feed-forward comes whole, all else layer by layer."""
    model = tiny.video_transformer()
    homes = [module for unit in put(model, RULES["leaves ahead"]).units for module in unit.modules]
    for block in model.transformer_blocks:
        assert block.ff in homes
        assert block.attn1.to_q in homes
        assert block.ff.net[2] not in homes
