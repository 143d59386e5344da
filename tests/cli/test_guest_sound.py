"""`lowtide generate` with pipelines that make sound: alone, or beside frames."""

import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tests.cli.test_guests import generate, one_line, place  # noqa: F401
from tests.guests.families import FAMILIES
from tests.guests.family import ready
from tests.media.test_wave_file import read

from lowtide.cli.guest_files import _write_sounds
from lowtide.guests.results import Results
from lowtide.guests.sounds import sampling_rate, sounds_in

pytest.importorskip("diffusers")
pytestmark = [
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="budgets are held by what /proc tells"),
    pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning"),
]
RATE = 64


def dance():
    """Dance Diffusion: noise becomes two channels of sound, without a prompt."""
    from diffusers import DanceDiffusionPipeline, IPNDMScheduler, UNet1DModel

    network = UNet1DModel(
        block_out_channels=(32, 32, 64),  # a head of attention has 32
        extra_in_channels=64,
        sample_size=128,
        sample_rate=RATE,
        in_channels=2,
        out_channels=2,
        flip_sin_to_cos=True,
        use_timestep_embedding=False,
        time_embedding_type="fourier",
        mid_block_type="UNetMidBlock1D",
        down_block_types=("DownBlock1DNoSkip", "DownBlock1D", "AttnDownBlock1D"),
        up_block_types=("AttnUpBlock1D", "UpBlock1D", "UpBlock1DNoSkip"),
    )
    return DanceDiffusionPipeline(unet=ready(network), scheduler=IPNDMScheduler())


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sound") / "dance"
    dance().save_pretrained(folder)
    return folder


def test_sound_alone_is_written_with_its_rate(model):
    made = generate(model, "--steps", 2, "--seed", 1, "--out", "x.wav", prompt="")
    assert made.exit_code == 0, made.output
    assert made.stdout.split() == ["x.wav"]
    assert f"Sound: {RATE} samples a second, 2 channels." in made.stderr
    pipe = dance()
    pipe.set_progress_bar_config(disable=True)
    own = pipe(num_inference_steps=2, generator=torch.Generator().manual_seed(1)).audios[0]
    rate, levels = read("x.wav")
    assert rate == RATE
    assert levels.shape == own.shape == (2, 128)
    assert np.abs(levels - own * 32767).max() <= 1


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ("--out x.png", "--out x.png: sound is written as WAV. Give a name that ends in .wav, or a folder."),
        ("--fps 9", "--fps is for videos, and a DanceDiffusionPipeline makes sound"),
        ("--video", "makes sound: leave out --video"),
    ],
)
def test_options_for_pictures_are_refused_before_anything_is_loaded(model, options, told):
    assert told in one_line(generate(model, *options.split(), prompt=""))


@pytest.mark.slow
def test_the_sound_of_a_clip_lies_beside_it(tmp_path):
    FAMILIES["LTX2"]().pipeline.save_pretrained(tmp_path / "ltx2")
    options = ("--size", "32x32", "--frames", 9, "--steps", 2, "--seed", 1, "--set", "max_sequence_length=16")
    for _ in range(2):  # a name that was given is written again
        made = generate(tmp_path / "ltx2", *options, "--out", "x.mp4")
        assert made.exit_code == 0, made.output
        assert made.stdout.split() == ["x.mp4", "x.wav"]
    rate, levels = read("x.wav")
    assert f"Sound: {rate} samples a second" in made.stderr
    assert "Not written" not in made.stderr
    assert levels.any()


WRITTEN = {
    "beside a clip": (Path("x.mp4"), ("x.mp4",), ["x.wav"]),
    "beside a clip with a name of ours": (None, ("a-1.mp4",), ["a-1-2.wav"]),  # for it is taken
    "alone": (Path("y.wav"), ("y.wav",), ["y.wav"]),
    "each with its name": (None, ("b-1.wav", "b-2.wav"), ["b-1.wav", "b-2.wav"]),
}


@pytest.mark.parametrize("where", WRITTEN)
def test_where_it_is_written(where, capsys):
    out, paths, names = WRITTEN[where]
    for taken in ("x.wav", "a-1.wav"):
        Path(taken).write_bytes(b"taken")
    results = Results((), (), (), (np.full((2, 9), 0.5, dtype=np.float32),) * len(paths))
    request = SimpleNamespace(out=out, seeds=tuple(range(len(paths))), class_name="LTX2Pipeline")
    call = SimpleNamespace(paths=tuple(map(Path, paths)))
    pipe = SimpleNamespace(vocoder=SimpleNamespace(config=SimpleNamespace(output_sampling_rate=24000)))
    _write_sounds(results, request, call, pipe)
    told = capsys.readouterr()
    assert told.out.split() == names
    assert told.err == "Sound: 24000 samples a second, 2 channels.\n"
    for name in names:
        rate, levels = read(name)
        assert (rate, levels.shape) == (24000, (2, 9))
    assert Path("a-1.wav").read_bytes() == b"taken"


def test_without_a_rate_it_is_not_written_and_a_line_says_so(capsys):
    request = SimpleNamespace(out=None, seeds=(1,), class_name="XPipeline")
    sounds = (np.zeros((2, 9), dtype=np.float32),)
    _write_sounds(Results((), (), (), sounds), request, SimpleNamespace(paths=(Path("x.wav"),)), SimpleNamespace())
    assert "A XPipeline does not say how many samples" in capsys.readouterr().err
    assert not Path("x.wav").exists()


FORMS = {
    "a tensor": torch.zeros(2, 3, 9, dtype=torch.bfloat16),
    "an array of one channel": np.zeros((2, 9), dtype=np.float64),
    "a list": [torch.zeros(1, 9), np.zeros(9, dtype=np.float32)],
}


@pytest.mark.parametrize("form", FORMS)
def test_the_forms_of_sound(form):
    sounds = sounds_in(FORMS[form])
    assert len(sounds) == 2
    assert all(sound.ndim == 2 and sound.shape[1] == 9 and sound.dtype == np.float32 for sound in sounds)


@pytest.mark.parametrize(
    "value", [None, 1, [], [1], ["x"], torch.zeros(9), torch.zeros(1, 2, 3, 4), np.zeros((2, 3), int)]
)
def test_what_is_no_sound(value):
    assert sounds_in(value) is None


def test_where_the_rate_is_said():
    def has(**entries):
        return SimpleNamespace(config=SimpleNamespace(**entries))

    vocoder, vae = has(output_sampling_rate=24000), has(sampling_rate=44100)
    assert sampling_rate(SimpleNamespace(vocoder=vocoder, sample_rate=16000)) == 24000
    assert sampling_rate(SimpleNamespace(audio_sample_rate=48000, audio_vae=has(sample_rate=16000))) == 48000
    assert sampling_rate(SimpleNamespace(vae=vae)) == 44100
    assert sampling_rate(SimpleNamespace(vae=has(scale=3))) is None
