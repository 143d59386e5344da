"""The decoders of the peer's other autoencoders row by row: whole results, memory as predicted, refusals by name."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from tests import tiny
from tests.activations.quality import worst
from tests.activations.recorded_once import recorded_once  # noqa: F401
from tests.memory_peaks import peak_bytes

from lowtide import apply_row_streaming, remove_row_streaming
from lowtide.activations import masks
from lowtide.activations.frame_cache import KeptRows
from lowtide.activations.row_streaming import RowStreaming, row_streaming_of
from lowtide.activations.run import Run
from lowtide.activations.steps import PadFromInside, Regroup
from lowtide.guests.guest_decode import GuestDecode
from lowtide.memory.rule import Tier
from lowtide.planning.workload import EXACT, EXACT_ON_DISK, WHOLE
from lowtide.prediction import tracing
from lowtide.prediction.component import trace_call

diffusers = pytest.importorskip("diffusers")
pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]
MOST_ERROR = 1e-5
DC = {
    "latent_channels": 4,
    "attention_head_dim": 8,
    **{f"{end}_block_types": ("ResBlock", "EfficientViTBlock") for end in ("encoder", "decoder")},
    **{f"{end}_block_out_channels": (16, 32) for end in ("encoder", "decoder")},
    **{f"{end}_layers_per_block": (1, 1) for end in ("encoder", "decoder")},
    **{f"{end}_qkv_multiscales": ((), (5,)) for end in ("encoder", "decoder")},
}
LTX = {
    "latent_channels": 4,
    "block_out_channels": (8, 8, 16),
    "decoder_block_out_channels": (8, 16, 32),
    "down_block_types": ("LTXVideoDownBlock3D",) * 3,
    "layers_per_block": (1,) * 4,
    "decoder_layers_per_block": (1,) * 4,
    "spatio_temporal_scaling": (True,) * 3,
    "decoder_spatio_temporal_scaling": (True,) * 3,
    "decoder_inject_noise": (False,) * 4,
    "upsample_residual": (True,) * 3,
    "upsample_factor": (2,) * 3,
    "patch_size": 2,
    "timestep_conditioning": True,
}
HUNYUAN = {"latent_channels": 4, "block_out_channels": (8, 8, 8, 12), "layers_per_block": 1, "norm_num_groups": 4}
HUNYUAN15 = {
    "latent_channels": 4,
    "block_out_channels": (16, 16, 32),
    "layers_per_block": 1,
    "spatial_compression_ratio": 4,
    "temporal_compression_ratio": 2,
}
WAN = {"base_dim": 8, "z_dim": 4, "dim_mult": [1, 2, 2], "num_res_blocks": 1, "temperal_downsample": [True, True]}
WAN22 = {"decoder_base_dim": 8, "is_residual": True, "patch_size": 2, "in_channels": 12, "out_channels": 12}
COGVIDEOX = {"block_out_channels": [8, 8, 12, 16], "norm_num_groups": 4, "layers_per_block": 1, "latent_channels": 4}
FLUX2 = {
    "block_out_channels": (32, 32),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "latent_channels": 4,
    "layers_per_block": 1,
}
HUNYUAN_IMAGE = {
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 4,
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "spatial_compression_ratio": 2,
    "sample_size": 16,
}
KVAE = {"channels": 32, "num_enc_blocks": 1, "num_dec_blocks": 1, "z_channels": 4, "ch_mult": (1, 2), "sample_size": 16}
MOCHI = {
    "latent_channels": 4,
    "encoder_block_out_channels": (32,) * 4,
    "decoder_block_out_channels": (32,) * 4,
    "layers_per_block": (1,) * 5,
}
COSMOS = {
    "latent_channels": 4,
    "encoder_block_out_channels": (16,) * 3,
    "decode_block_out_channels": (16,) * 3,
    "num_layers": 1,
    "resolution": 32,
    "spatial_compression_ratio": 4,
    "temporal_compression_ratio": 4,
}
LTX2 = {
    "latent_channels": 4,
    "block_out_channels": (8, 8, 12, 16),
    "decoder_block_out_channels": (8, 16, 32),
    "layers_per_block": (1,) * 5,
    "decoder_layers_per_block": (1,) * 4,
    "patch_size": 2,
}
SVD = {"block_out_channels": (32,), "latent_channels": 4}
CASES = {
    "Flux 2": ("AutoencoderKLFlux2", FLUX2, (5, 4)),
    "Sana": ("AutoencoderDC", DC, (5, 4)),
    "Sana interpolated": ("AutoencoderDC", {**DC, "upsample_block_type": "interpolate"}, (5, 4)),
    "HunyuanImage": ("AutoencoderKLHunyuanImage", HUNYUAN_IMAGE, (5, 4)),
    "Kandinsky": ("AutoencoderKLKVAE", KVAE, (5, 4)),
    "LTX": ("AutoencoderKLLTXVideo", {**LTX, "timestep_conditioning": False}, (2, 3, 2)),
    "LTX with a time": ("AutoencoderKLLTXVideo", LTX, (2, 3, 2)),
    "LTX 2": ("AutoencoderKLLTX2Video", LTX2, (2, 3, 2)),
    "HunyuanVideo": ("AutoencoderKLHunyuanVideo", HUNYUAN, (3, 3, 2)),
    "HunyuanVideo 1.5": ("AutoencoderKLHunyuanVideo15", HUNYUAN15, (3, 3, 2)),
    "HunyuanImage refiner": ("AutoencoderKLHunyuanImageRefiner", HUNYUAN15, (1, 3, 2)),
    "Wan": ("AutoencoderKLWan", WAN, (4, 3, 2)),
    "Wan 2.2": ("AutoencoderKLWan", {**WAN, **WAN22}, (4, 3, 2)),
    "Qwen-Image": ("AutoencoderKLQwenImage", WAN, (1, 5, 4)),
    "Qwen-Image 2.1": ("AutoencoderKLQwenImage21", {**WAN, "decoder_base_dim": 8}, (1, 5, 4)),
    "CogVideoX": ("AutoencoderKLCogVideoX", COGVIDEOX, (5, 3, 2)),
    "Mochi": ("AutoencoderKLMochi", MOCHI, (2, 2, 2)),
    "Cosmos": ("AutoencoderKLCosmos", COSMOS, (2, 3, 2)),
    "Stable Video Diffusion": ("AutoencoderKLTemporalDecoder", SVD, (5, 4)),
}

WAYS = [{"work": 1, "rows": "disk"}, {"work": 20_000}]
BY_LARGE_BANDS = ("Sana", "LTX", "Stable Video Diffusion")
"""Those that are decoded with more than one size of bands in the default run, too."""


@pytest.fixture(autouse=True)
def _without_gradients():
    with torch.no_grad():
        yield


@functools.cache
def autoencoder(name):
    kind, config, _ = CASES[name]
    return tiny.set_weights(getattr(diffusers, kind)(**config)).eval().requires_grad_(False)


def call_of(name, batch=1, size=None):
    """Latents, and what the autoencoder is told beside them."""
    *frames, rows, columns = CASES[name][2]
    count = 3 if name == "Stable Video Diffusion" else batch
    z = tiny.numbers((count, 4, *frames, *(size or (rows, columns))), 3)
    beside = {
        "LTX with a time": {"temb": torch.tensor([0.05, 0.4])[:batch]},
        "Stable Video Diffusion": {"num_frames": 3},
    }
    return z, beside.get(name, {})


def by_rows(vae, z, beside, **options):
    apply_row_streaming(vae.decoder, **options)
    try:
        return vae.decode(z, **beside).sample, row_streaming_of(vae.decoder).last
    finally:
        remove_row_streaming(vae.decoder)


@functools.cache
def as_a_whole(name):
    z, beside = call_of(name)
    return autoencoder(name).decode(z, **beside).sample


@pytest.mark.parametrize(
    ("name", "options"),
    [
        pytest.param(name, options, marks=() if options is WAYS[0] or name in BY_LARGE_BANDS else pytest.mark.slow)
        for name in CASES
        for options in WAYS
    ],
)
def test_the_result_is_the_whole_one(name, options):
    (z, beside), whole = call_of(name), as_a_whole(name)
    ours, last = by_rows(autoencoder(name), z, beside, **options)
    assert ours.shape == whole.shape
    assert worst(ours, whole) <= MOST_ERROR
    assert last.rows is Tier(options.get("rows", "device"))


@pytest.mark.parametrize("name", ["Wan", "LTX with a time"])
def test_clips_of_a_batch_keep_frames_of_their_own(name):
    vae, (z, beside) = autoencoder(name), call_of(name, batch=2)
    assert worst(by_rows(vae, z, beside, work=20_000)[0], vae.decode(z, **beside).sample) <= MOST_ERROR


PEAKS = {
    "Sana": ("device", (48, 40)),
    "Kandinsky": ("disk", (24, 20)),
    "LTX": ("device", (10, 8)),
    "HunyuanVideo 1.5": ("disk", (10, 8)),
    "Wan": ("disk", (6, 5)),
    "Stable Video Diffusion": ("device", (24, 20)),
}


@pytest.mark.parametrize("name", PEAKS)
@pytest.mark.skipif(torch.get_num_threads() > 1, reason="scratchpads were measured with one thread")
def test_the_peak_is_the_predicted_one(name):
    rows, size = PEAKS[name]
    vae, (z, beside) = autoencoder(name), call_of(name, size=size)
    apply_row_streaming(vae.decoder, work=300_000, rows=rows)
    vae.decode(z, **beside)  # what is made once and kept is there
    measured = peak_bytes(lambda: vae.decode(z, **beside)) + z.nbytes
    on_meta, copied = z.to("meta"), copy.deepcopy(vae).to("meta")
    remove_row_streaming(vae.decoder)
    predicted = trace_call(lambda: copied.decode(on_meta, **beside), [copied], [on_meta]).peak
    assert measured * (1 - 1e-4) - 64 <= predicted <= measured * 1.05, f"{predicted / measured - 1:+.3%}"


@pytest.mark.parametrize("name", ["Flux 2", "Sana", "LTX", "HunyuanVideo"])
def test_the_forecast_holds_and_is_near(name):
    vae, (z, _) = autoencoder(name), call_of(name, size=(12, 10))
    streaming = apply_row_streaming(vae.decoder, work=30_000)
    forecast = streaming.forecast(tuple(z.shape))
    vae.decoder(z)
    remove_row_streaming(vae.decoder)
    assert streaming.last.stored <= forecast.stored <= 1.6 * streaming.last.stored


@pytest.mark.parametrize("rows", ["device", "disk"])
def test_of_calls_for_frames_that_are_alike_one_is_gone_through(rows, monkeypatch):
    """Two more are not alike: the first has no frames before it, and after the second one more is kept."""
    run, calls = RowStreaming._run, []
    monkeypatch.setattr(RowStreaming, "_run", lambda *args: calls.append(1) or run(*args))

    def predicted():
        calls.clear()
        vae, z = copy.deepcopy(autoencoder("Wan")).to("meta"), torch.empty(1, 4, 6, 4, 3, device="meta")
        apply_row_streaming(vae.decoder, work=20_000, rows=rows)
        return trace_call(lambda: vae.decode(z), [vae], [z]), len(calls)

    call, gone_through = predicted()
    monkeypatch.setattr(tracing, "_is_watched", lambda _: True)  # so that no call is taken for another
    assert predicted() == (call, 6)
    assert gone_through <= 4


def test_where_rows_rest_is_chosen_for_all_calls_of_a_clip():
    """The first call of a clip stores less than those after it, and is forecast as the largest of them."""
    vae, (z, beside) = autoencoder("Wan"), call_of("Wan", size=(6, 5))
    whole = vae.decode(z, **beside).sample
    stored = by_rows(vae, z, beside, work=20_000)[1].stored
    ours, last = by_rows(vae, z, beside, work=20_000, budget=int(0.8 * stored))
    assert last.rows is Tier.DISK
    assert worst(ours, whole) <= MOST_ERROR


def test_a_guest_decodes_in_each_way():
    vae, (z, beside) = autoencoder("Wan"), call_of("Wan")
    whole, decode = vae.decode(z, **beside).sample, GuestDecode.for_(vae)
    for way in (EXACT, EXACT_ON_DISK):
        decode.set(way)
        assert worst(vae.decode(z, **beside).sample, whole) <= MOST_ERROR
    decode.set(WHOLE)
    assert torch.equal(vae.decode(z, **beside).sample, whole)


# ---- refusals


def refused(vae, z, told, **beside):
    apply_row_streaming(vae.decoder)
    with pytest.raises(ValueError, match=rf"cannot be computed row by row: .*{told}"):
        vae.decode(z, **beside)


def test_random_numbers_are_refused():
    config = {**LTX, "decoder_inject_noise": (True,) * 4}
    vae = diffusers.AutoencoderKLLTXVideo(**config).eval()
    refused(vae, torch.zeros(1, 4, 2, 2, 2), "draws random numbers by randn", temb=torch.tensor([0.05]))


def test_frames_kept_in_attributes_are_refused():
    config = {"latent_channels": 4, "block_out_channels": [8] * 4, "norm_num_groups": 4, "layers_per_block": 1}
    vae = diffusers.AutoencoderKLMagvit(**config).eval()
    refused(vae, torch.zeros(1, 4, 2, 2, 2), "keeps a tensor in prev_features for later calls")


def test_as_few_pixels_as_channels_of_a_head_are_refused():
    """Sana's attention then multiplies all pixels with one another."""
    refused(copy.deepcopy(autoencoder("Sana")), torch.zeros(1, 4, 2, 3), "multiplies rows of pixels with one another")


# ---- negative controls


def differs(name):
    vae, (z, beside) = autoencoder(name), call_of(name)
    return worst(by_rows(vae, z, beside, work=1)[0], vae.decode(z, **beside).sample) > 100 * MOST_ERROR


def test_a_sum_over_some_pixels_would_be_seen(monkeypatch):
    bands = Run._bands_of
    monkeypatch.setattr(Run, "_bands_of", lambda *args: list(bands(*args))[:-1])
    assert differs("Sana")


def test_attention_without_its_mask_would_be_seen(monkeypatch):
    part = masks._part
    monkeypatch.setattr(masks, "_part", lambda *args: torch.zeros_like(part(*args)))
    assert differs("HunyuanVideo")
    assert differs("HunyuanVideo 1.5")


def test_other_frames_before_a_batch_would_be_seen(monkeypatch):
    kept = KeptRows.__init__

    def mixed(self, shape, dtype, tier=Tier.DEVICE, pages=(), stores=()):
        for store in stores:
            store._planes.reverse()
        kept(self, shape, dtype, tier, pages, stores)

    monkeypatch.setattr(KeptRows, "__init__", mixed)
    assert differs("Wan")


def test_rows_shuffled_wrongly_would_be_seen(monkeypatch):
    run = Regroup.run

    def turned(self, bands, span, constant):
        return run(self, bands, span, constant).flip(-1)

    monkeypatch.setattr(Regroup, "run", turned)
    assert differs("LTX")


def test_edges_padded_with_other_rows_would_be_seen(monkeypatch):
    monkeypatch.setattr(PadFromInside, "run", _with_zeros)
    assert differs("Kandinsky")
    assert differs("HunyuanVideo")


def _with_zeros(self, bands, span, constant):
    (first, end), rows = self._outside(span)
    around = (*self.around[:2], *rows, *self.around[4:])[: 2 * (bands[0].ndim - 2)]
    padded = torch.nn.functional.pad(bands[0], around)
    return padded.narrow(-2, first + rows[0] - self.needs(span)[0][0], end - first)
