"""Sound is written as 16-bit WAV, whole or not at all."""

import wave

import numpy as np
import pytest

from lowtide.media.wave_file import write_wave

SOUND = np.array([[0.0, 0.5, -0.5, 1.0], [0.25, -1.0, 2.0, -3.0]], dtype=np.float32)


def read(path):
    with wave.open(str(path)) as sound:
        levels = np.frombuffer(sound.readframes(sound.getnframes()), dtype="<i2")
        return sound.getframerate(), levels.reshape(-1, sound.getnchannels()).T


def test_what_is_written_is_read_again(tmp_path):
    write_wave(SOUND, tmp_path / "x.wav", 16000)
    rate, levels = read(tmp_path / "x.wav")
    assert rate == 16000
    assert levels.tolist() == [[0, 16384, -16384, 32767], [8192, -32767, 32767, -32767]]  # louder ones are cut
    assert [file.name for file in tmp_path.iterdir()] == ["x.wav"]


def test_what_cannot_be_heard_leaves_the_old_file(tmp_path):
    (tmp_path / "x.wav").write_bytes(b"old")
    with pytest.raises(ValueError, match="NaN or infinity"):
        write_wave(np.array([[np.nan]], dtype=np.float32), tmp_path / "x.wav", 16000)
    assert (tmp_path / "x.wav").read_bytes() == b"old"
