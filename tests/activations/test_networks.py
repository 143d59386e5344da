"""Which networks can be streamed: others' autoencoders, random ones, every rule alone, and refusals by name."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tests import tiny
from tests.activations.quality import psnr, worst
from tests.thinned import thinned
from torch import nn

from lowtide import apply_row_streaming, remove_row_streaming
from lowtide.activations.row_streaming import row_streaming_of
from lowtide.activations.run import Run


@pytest.fixture(autouse=True)
def _without_gradients():
    with torch.no_grad():
        yield


def check(module, x, works=(1, 3_000, 30_000, None), least=120):
    module = tiny.set_weights(module)
    for norm in (part for part in module.modules() if isinstance(part, nn.BatchNorm2d)):
        norm.running_var.abs_()
    whole = module(x)
    for work in works:
        apply_row_streaming(module, work=work)
        ours = module(x)
        remove_row_streaming(module)
        assert ours.shape == whole.shape
        assert psnr(ours, whole) >= least
        assert worst(ours, whole) <= 1e-4


class Network(nn.Module):
    """A function of a map between two convolutions, so that bands need halos."""

    def __init__(self, function, channels=8, after=8):
        super().__init__()
        self.before = nn.Conv2d(channels, channels, 3, padding=1)
        self.after = nn.Conv2d(after, 4, 3, padding=1)
        self.norm = nn.GroupNorm(2, channels)
        self.batch = nn.BatchNorm2d(channels)
        self.layer = nn.LayerNorm(channels)
        self.project = nn.Linear(channels, channels)
        self.scale = nn.Parameter(torch.ones(channels))
        self.function = function

    def forward(self, x):
        return self.after(self.function(self, self.before(x)))


def tokens(x):
    return x.flatten(2).transpose(1, 2)


def attend(net, x, heads=2):
    b, c, h, w = x.shape
    q, k, v = (
        one.view(b, h * w, heads, c // heads).transpose(1, 2) for one in (tokens(x), net.project(tokens(x)), tokens(x))
    )
    out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, h * w, c)
    return x + out.transpose(-1, -2).reshape(b, c, h, w)


def root_mean_square(x):
    return x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + 1e-5)


def seen_through_a_view(net, x):
    """A function that could be written over its input, which another one still sees."""
    y = net.before(x)
    seen = y.flatten(2)
    return F.relu(y) + net.norm(seen).view(y.shape) + seen.view(y.shape)


def in_place(net, x):
    y = x * 2
    y += 1
    y.mul_(0.5)
    return F.relu(y, inplace=True)


def several_uses(net, x):
    y = F.silu(net.norm(x))
    return y + net.norm(y) * torch.sigmoid(x) - x / 3


LOCAL = {
    "group norm": lambda net, x: net.norm(x),
    "group norm of tokens": lambda net, x: net.norm(x.flatten(2)).view(x.shape),
    "batch norm": lambda net, x: net.batch(x),
    "layer norm over channels": lambda net, x: net.layer(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2),
    "rms norm by hand": lambda net, x: (
        x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + 1e-5) * net.scale.view(1, -1, 1, 1)
    ),
    "linear on tokens": lambda net, x: net.project(tokens(x)).transpose(1, 2).reshape(x.shape),
    "activations": lambda net, x: F.gelu(F.leaky_relu(x)) + F.mish(x).clamp(-1, 1) * torch.tanh(x),
    "in place": in_place,
    "seen through a view": seen_through_a_view,
    "several uses": several_uses,
    "chunks": lambda net, x: torch.cat([part * (i + 1) for i, part in enumerate(x.chunk(2, dim=1))], dim=1),
    "indexing": lambda net, x: torch.cat([x[:, :3], x[:, 3:, :, :]], dim=1)[:, None][:, 0],
    "casts": lambda net, x: x.to(torch.float64).float().type_as(x).contiguous(),
    "numbers": lambda net, x: 2 - x * 3 / 1.5 + (-x) ** 2,
    "attention": attend,
    "attention twice": lambda net, x: attend(net, attend(net, x), heads=4),
    "attention after enlarging": lambda net, x: attend(net, F.interpolate(x, scale_factor=2.0)),
    "dropout at inference": lambda net, x: F.dropout(x, 0.5, training=net.training),
    "padding": lambda net, x: F.pad(F.pad(x, (1, 2, 3, 1)), (0, -1, -2, 0)),
    "enlarging unevenly": lambda net, x: F.interpolate(x, scale_factor=(3, 2)),
    "a shortcut around it all": lambda net, x: x + F.silu(net.norm(net.before(x))),
    "a mean over channels": lambda net, x: x - x.mean(1, keepdim=True),
    "swapped and back": lambda net, x: x.transpose(2, 3).transpose(2, 3).movedim(1, -1).movedim(-1, 1),
}


@pytest.mark.parametrize(("name", "size"), thinned(LOCAL, [(7, 7), (1, 5), (16, 3), (2, 49)]))
def test_every_rule(name, size):
    check(Network(LOCAL[name]), tiny.numbers((2, 8, *size), 3))


def assigned(net, x):
    x[:, :2] = 0
    return x


def uneven_attention(net, x):
    keys = F.conv2d(x, net.before.weight, stride=(1, 7), padding=1)
    values = F.conv2d(x, net.before.weight, stride=(7, 1), padding=1)
    return F.scaled_dot_product_attention(tokens(x), tokens(keys), tokens(values)).transpose(1, 2).view(x.shape)


class Looking(nn.Module):
    def forward(self, x):
        return x if x.mean() > 0 else -x


def two_maps(net, x):
    return x + torch.linspace(0, 1, x.shape[2])[:, None]


REFUSED = {
    "flip": (lambda net, x: x.flip(2), "flip"),
    "a sum over rows": (lambda net, x: x - x.mean((2, 3), keepdim=True), "mean"),
    "a product of matrices": (lambda net, x: x @ x.transpose(2, 3) @ x, "matmul"),
    "smooth enlarging": (lambda net, x: F.interpolate(x, scale_factor=2.0, mode="bilinear"), "interpolate.*bilinear"),
    "an uneven size": (lambda net, x: F.interpolate(x, size=(10, 9)), "interpolate"),
    "rows taken apart": (lambda net, x: x[:, :, 1:], "getitem"),
    "rows as channels": (lambda net, x: x.transpose(1, 2).flatten(1, 2)[:, None].expand(1, 8, -1, -1), "expand"),
    "rows mixed": (lambda net, x: x.reshape(1, 8, -1, 7).permute(0, 1, 3, 2).reshape(x.shape), "convolves"),
    "its own numbers": (two_maps, "tensor.*of its own"),
    "a transposed convolution": (lambda net, x: F.conv_transpose2d(x, net.before.weight), "conv_transpose2d"),
    "wrapping around": (lambda net, x: F.pad(x, (1, 1, 1, 1), mode="circular"), "circular"),
    "random numbers": (lambda net, x: x + torch.randn(x.shape, device=x.device), "draws random numbers"),
    "random numbers like": (lambda net, x: x + torch.randn_like(x), "draws random numbers"),
    "training dropout": (lambda net, x: F.dropout(x, 0.5), r"eval\(\)"),
    "training batch norm": (lambda net, x: F.batch_norm(x, None, None, training=True), r"eval\(\)"),
    "a mask": (lambda net, x: F.scaled_dot_product_attention(x, x, x, attn_mask=net.scale[:7, None] > 0), "mask"),
    "written to a view": (lambda net, x: x[:, :4].add_(1).repeat(1, 2, 1, 1), "others see"),
    "written behind a view": (lambda net, x: x + 0 * x.detach().mul_(3), "others see"),
    "written by index": (assigned, "__setitem__"),
    "written by out": (lambda net, x: torch.mul(x, 2, out=x), "writes into"),
    "written to a weight": (lambda net, x: x * net.scale.mul_(2).view(1, -1, 1, 1), "others see"),
    "a linear of the map": (
        lambda net, x: F.linear(tokens(x), tokens(x)[0]).mean(2).view(1, 1, 7, 7),
        "made of the map",
    ),
    "a scale that is not whole": (lambda net, x: F.interpolate(x, scale_factor=2.1), "interpolate"),
    "rows counted": (lambda net, x: x.narrow(2, 0, 7), "narrow"),
    "squeezing": (lambda net, x: x.squeeze()[None], "squeeze"),
    "a weight as an index": (lambda net, x: x[:, net.scale.long()], "getitem"),
    "keys and values of other rows": (uneven_attention, "keys and values"),
    "columns for rows": (lambda net, x: x.transpose(2, 3), "convolves"),
    "the largest of all": (lambda net, x: x / x.amax(), "amax"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_needs_the_whole_map_is_refused_by_name_before_any_work(name, monkeypatch):
    function, told = REFUSED[name]
    module, ran = tiny.set_weights(Network(function)), []
    monkeypatch.setattr(Run, "__call__", lambda *_: ran.append(1))
    apply_row_streaming(module)
    with pytest.raises(ValueError, match=rf"(?s)Network cannot be computed row by row.*{told}.*enable_vae_tiling"):
        module(tiny.numbers((1, 8, 7, 7), 3))
    assert ran == []
    remove_row_streaming(module)


def test_a_network_that_looks_at_values_or_returns_several_is_refused():
    for module, told in ((Looking(), "mean"), (Branching(), "looks at values"), (Several(), "returns a tuple")):
        apply_row_streaming(module)
        with pytest.raises(ValueError, match=told):
            module(tiny.numbers((1, 8, 7, 7), 3))


@pytest.mark.parametrize(
    "returned",
    [
        lambda x: torch.cat([x, x]),
        lambda x: x.permute(0, 2, 3, 1) * 2,
        lambda x: x.flatten(2) * 1,
    ],
    ids=["two pictures", "channels last", "tokens"],
)
def test_an_output_of_another_form_is_refused(returned):
    module = Function(returned)
    apply_row_streaming(module)
    with pytest.raises(ValueError, match="returns a Tensor, not one map"):
        module(tiny.numbers((1, 8, 7, 7), 3))


@pytest.mark.parametrize("size", [(7, 7), (1, 5), (40, 3)], ids=str)
@pytest.mark.parametrize(
    "function",
    [
        lambda x: x,
        lambda x: x * 1,
        lambda x: x.flatten(2).view(x.shape),
        lambda x: F.group_norm(x, 2) + F.group_norm(x * 2, 4),
        lambda x: F.pad(x, (0, 0, 9, 0)) - F.pad(x, (0, 0, 0, 9)),
        lambda x: F.pad(x * 2, (0, 0, 3, 2)) + F.pad(x * 3, (0, 0, 0, 5)),
    ],
    ids=["nothing", "one", "views", "norms of the input", "rows far apart", "both ends"],
)
def test_networks_without_convolutions(function, size):
    check(Function(function), tiny.numbers((2, 8, *size), 3))


def test_a_plan_is_made_anew_when_the_network_changes():
    x = tiny.numbers((2, 8, 9, 7), 3)
    network = tiny.set_weights(nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3)))
    network[1].running_var.abs_()
    apply_row_streaming(network, work=3_000)
    network(x)
    network[2] = tiny.set_weights(nn.Conv2d(8, 8, 5, padding=2), 1)
    network.append(nn.ReLU())
    ours, streaming = network(x), network.__dict__.pop("forward")
    assert psnr(ours, network(x)) > 120
    network.__dict__["forward"] = streaming
    network.train()
    with pytest.raises(ValueError, match=r"eval\(\)"):
        network(x)


class Function(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


class Several(nn.Module):
    def forward(self, x):
        return x, x


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x):
        return x * self.scale if float(self.scale) > 0 else -x


@st.composite
def networks(draw):
    """Convolutions, norms, enlargements and shortcuts in any order."""
    layers = []
    for _ in range(draw(st.integers(1, 6))):
        kind = draw(st.sampled_from(["conv", "norm", "act", "up", "shortcut", "wide", "pad"]))
        if kind == "conv":
            kernel, dilation = draw(st.integers(1, 5)), draw(st.integers(1, 2))
            stride, padding = draw(st.integers(1, 2)), draw(st.integers(kernel, kernel + 1))
            layers.append(nn.Conv2d(8, 8, kernel, stride, padding, dilation, groups=draw(st.sampled_from([1, 2, 8]))))
        elif kind == "norm":
            layers.append(nn.GroupNorm(draw(st.sampled_from([1, 2, 8])), 8))
        elif kind == "act":
            layers.append(draw(st.sampled_from([nn.SiLU(), nn.ReLU(), nn.GELU(), nn.Tanh()])))
        elif kind == "up":
            layers.append(nn.Upsample(scale_factor=draw(st.integers(1, 3))))
        elif kind == "pad":
            layers.append(nn.ZeroPad2d((draw(st.integers(0, 2)), 1, draw(st.integers(0, 3)), draw(st.integers(0, 3)))))
        elif kind == "wide":
            layers.append(nn.Sequential(nn.Conv2d(8, 12, 1), nn.SiLU(), nn.Conv2d(12, 8, 3, padding=1)))
        else:
            layers.append(Shortcut(nn.Sequential(nn.GroupNorm(2, 8), nn.SiLU(), nn.Conv2d(8, 8, 3, padding=1))))
    return nn.Sequential(*layers)


class Shortcut(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner
        self.project = nn.Conv2d(8, 8, 1)

    def forward(self, x):
        return self.project(x) + self.inner(x)


@settings(max_examples=25)
@given(networks(), st.integers(1, 12), st.integers(1, 9), st.sampled_from([1, 2_000, 20_000]))
def test_random_networks(network, rows, columns, work):
    with torch.no_grad():
        module, x = tiny.set_weights(network), tiny.numbers((1, 8, rows, columns), 3)
        try:
            whole = module(x)
        except (RuntimeError, ValueError):
            return  # a kernel larger than its map
        apply_row_streaming(module, work=work, rows="disk")
        ours, streaming = module(x), row_streaming_of(module)
        assert streaming.last.stored <= streaming.forecast(tuple(x.shape)).stored
        scale = max(float(whole.double().abs().max()), 1e-3)
        assert ours.shape == whole.shape
        assert float((ours - whole).abs().max()) <= 2e-4 * scale


PEERS = {
    "AutoencoderKL": {**tiny.VAES["four levels"]},
    "AutoencoderTiny": {},
    "VQModel": {
        "block_out_channels": (32, 64),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
    },
    "AsymmetricAutoencoderKL": {
        "down_block_out_channels": (32, 64),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_out_channels": (32, 64),
        "up_block_types": ("UpDecoderBlock2D",) * 2,
    },
}


@pytest.mark.parity
@pytest.mark.parametrize(("name", "part", "size"), thinned(PEERS, ["encoder", "decoder"], [(12, 20), (17, 8)]))
def test_the_peers_autoencoders(name, part, size):
    diffusers = pytest.importorskip("diffusers")
    module = getattr(getattr(diffusers, name)(**PEERS[name]).eval(), part)
    channels = next(iter(module.parameters())).shape[1]
    side = 4 if part == "encoder" else 1
    check(module, tiny.numbers((1, channels, size[0] * side, size[1] * side), 3), works=(50_000, None))
