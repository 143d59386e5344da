"""Terminals of few characters: every command ends well there, and its words can be read."""

import io
import sys
import warnings

import pytest

from lowtide.cli import app as application
from lowtide.cli.terminal import make_readable


def written(encoding, arguments, monkeypatch):
    """What a command writes to both streams, and its exit status."""
    streams = {name: io.TextIOWrapper(io.BytesIO(), encoding=encoding) for name in ("stdout", "stderr")}
    for name, stream in streams.items():
        monkeypatch.setattr(sys, name, stream)
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)  # the command sets its own
    monkeypatch.setattr(sys, "argv", ["lowtide", *arguments])
    with pytest.raises(SystemExit) as ended:
        application.main()
    for stream in streams.values():
        stream.flush()
    return ended.value.code, *(stream.buffer.getvalue() for stream in streams.values())


PLAN = ("plan", "--ram", "2GB", "--size", "64")


@pytest.mark.parametrize(
    ("encoding", "arguments"),
    [*((encoding, PLAN) for encoding in ("ascii", "latin-1", "utf-8"))]
    + [("ascii", words) for words in (("--help",), ("plan", "--help"), ("doctor", "--help"), ("plan", "nöt ⛵×"))],
)
def test_every_command_can_be_read(encoding, arguments, monkeypatch):
    status, output, said = written(encoding, arguments, monkeypatch)
    assert status == (2 if arguments[-1].endswith("×") else 0), said
    assert output or said
    if arguments == PLAN:
        text = output.decode(encoding)
        assert "One gigabyte more" in text
        assert ("→" in text) is (encoding == "utf-8")
        assert "->" in text or encoding == "utf-8"


def test_what_is_written_instead(monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setattr(sys, "stderr", object())  # such as a notebook's
    make_readable()
    print("2×512 – é … ⛵", file=stream, flush=True)
    assert stream.buffer.getvalue() == b"2x512 - e ... ?\n"
