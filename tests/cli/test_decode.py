"""`lowtide generate` stopped or out of memory in decode, and `lowtide decode`, which goes on from there."""

import os
import shlex
import signal
import tempfile

import pytest
from PIL import Image
from safetensors.torch import save_file
from tests import tiny, tiny_video
from tests.fitting import fits
from tests.fitting.traced_once import traced_once  # noqa: F401
from tests.thinned import covering
from typer.testing import CliRunner

from lowtide.cli.app import app
from lowtide.cli.errors import Terminated
from lowtide.models.vae import AutoencoderKL
from lowtide.models.video_vae import AutoencoderKLCogVideoX
from lowtide.pipelines.latents import run_of_latents

PICTURE = ["generate", "sea", "--steps", "2", "--seed", "3", "--device", "cpu"]
VIDEO = [*PICTURE, "--video", "--sheet"]
pytestmark = pytest.mark.usefixtures("traced_once")
NO_ROOM = RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    fits.small(folder / "parts").save_pretrained(folder / "model")
    return str(folder / "model")


@pytest.fixture(scope="module")
def video_model(tmp_path_factory):
    return str(tiny_video.write_checkpoint(tmp_path_factory.mktemp("tiny") / "video"))


@pytest.fixture(autouse=True)
def folders(tmp_path, monkeypatch):
    """An empty folder to work in, and one for temporary files."""
    (tmp_path / "temporary").mkdir()
    (tmp_path / "here").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path


def lowtide(*arguments):
    return CliRunner(env={"COLUMNS": "140"}).invoke(app, [str(one) for one in arguments])


def failing_decode(monkeypatch, error):
    """Whatever decodes pictures or clips raises, but not while a run is planned on meta."""
    clips = AutoencoderKLCogVideoX
    for kind, name in ((AutoencoderKL, "decode_rows"), (clips, "decode"), (clips, "decode_frames")):
        decode = getattr(kind, name)

        def fail(self, latents, *args, decode=decode, **kwargs):
            if latents.is_meta:
                return decode(self, latents, *args, **kwargs)
            raise error

        monkeypatch.setattr(kind, name, fail)


def stopped(monkeypatch, error, *arguments):
    """The command, with a decode that raises, and the command that it names after that."""
    with monkeypatch.context() as patched:
        failing_decode(patched, error)
        result = lowtide(*arguments)
    command = result.stderr.partition("To go on from there: ")[2].strip()
    return result, shlex.split(command)[1:]


@pytest.mark.parametrize(
    ("stop", "budget"), covering([(KeyboardInterrupt(), 130), (Terminated(), 143)], [["--ram", "64GB"], []])
)
def test_stopped_while_decoding_it_goes_on_from_the_latents(model, stop, budget, monkeypatch, folders):
    error, code = stop
    options = [*PICTURE, "--model", model, "--size", "48x32", *budget]
    assert lowtide(*options, "--out", "whole.png").exit_code == 0
    result, command = stopped(monkeypatch, error, *options, "--out", "x.png")
    assert result.exit_code == code
    assert result.stderr.splitlines()[-2] == "Stopped. No half-written file is left behind."
    assert os.listdir() == ["whole.png"]
    monkeypatch.chdir(folders)  # from anywhere
    result = lowtide(*command)
    assert result.exit_code == 0, result.output
    assert result.stdout.strip() == str(folders / "here" / "x.png")
    with Image.open("here/whole.png") as whole, Image.open("here/x.png") as ours:
        assert ours.tobytes() == whole.tobytes()
        assert ours.text == whole.text
    assert [f"temporary/{name}" for name in os.listdir("temporary")] == [os.path.relpath(command[1])]


def test_a_video_and_its_sheet_go_on_too(video_model, monkeypatch, folders):
    options = [*VIDEO, "--model", video_model, "--fps", "12.5"]
    assert lowtide(*options, "--out", "whole.mp4").exit_code == 0
    result, command = stopped(monkeypatch, KeyboardInterrupt(), *options, "--out", "x.mp4")
    assert result.exit_code == 130
    result = lowtide(*command)
    assert result.exit_code == 0, result.output
    for end in (".mp4", "-sheet.png"):
        assert (folders / "here" / f"x{end}").read_bytes() == (folders / "here" / f"whole{end}").read_bytes()


def test_out_of_memory_names_a_budget_that_was_not_given(model, monkeypatch):
    result, command = stopped(monkeypatch, NO_ROOM, *PICTURE, "--model", model, "--out", "x.png")
    assert result.exit_code == 1
    assert "a budget such as --ram 4GB" in result.stderr
    assert command[-2:] == ["--ram", "auto"]
    result = lowtide(*command)
    assert result.exit_code == 0, result.output
    assert "Plan: " in result.stderr


@pytest.mark.filterwarnings("ignore:decode. memory ran out")
def test_out_of_memory_within_a_budget_does_not_advise_it_again(model, monkeypatch):
    result, command = stopped(monkeypatch, NO_ROOM, *PICTURE, "--model", model, "--ram", "64GB", "--out", "x.png")
    assert result.exit_code == 1
    assert "smaller --size, or" in result.stderr
    assert "--allow int8" in result.stderr
    assert "--ram" not in result.stderr.rpartition("Error: ")[2]
    assert run_of_latents(command[1])["budget"]["ram"] == "64GB"
    result, again = stopped(monkeypatch, NO_ROOM, *command)
    assert result.exit_code == 1
    assert again == command, "those of the file, not others"


def test_stopped_earlier_nothing_is_kept(model, monkeypatch, folders):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("lowtide.schedulers.DDIMScheduler.step", interrupt)
    result = lowtide(*PICTURE, "--model", model, "--scheduler", "ddim", "--ram", "64GB", "--out", "x.png")
    assert result.exit_code == 130
    assert "decode" not in result.stderr.partition("Stopped.")[2]
    assert os.listdir() == os.listdir(folders / "temporary") == []


def test_other_places_and_ways_may_be_asked_for(model, monkeypatch):
    _, command = stopped(monkeypatch, KeyboardInterrupt(), *PICTURE, "--model", model, "--ram", "64GB")
    result = lowtide(*command, "--out", "other.png", "--decode", "exact")
    assert result.exit_code == 0, result.output
    assert "Plan: " not in result.stderr
    result = lowtide(*command, "--out", "third.png", "--allow", "blended_tiling")
    assert result.exit_code == 0, result.output
    assert "Plan: " in result.stderr
    assert sorted(os.listdir()) == ["other.png", "third.png"]
    assert lowtide(*command, "--ram", "1GB", "--decode", "exact").exit_code == 2
    assert lowtide(*command, "--out", "x.jpg").exit_code == 2


def test_files_that_are_no_such_latents(model, tmp_path):
    assert "no file" in lowtide("decode", "none.safetensors").stderr
    save_file({"latents": tiny.numbers((1, 4, 4, 4), 1)}, tmp_path / "bare.safetensors")
    result = lowtide("decode", tmp_path / "bare.safetensors")
    assert result.exit_code == 2
    assert "pipe.decode_saved" in result.stderr


SCRIPT = """
import os, signal, sys, tempfile, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
tempfile.tempdir = {temporary!r}
os.chdir({here!r})
from lowtide.models.vae import AutoencoderKL
decode_rows = AutoencoderKL.decode_rows
def slow(self, latents, write):
    def first_rows(*rows):
        write(*rows)
        if latents.is_meta:  # the run is being planned
            return
        os.kill(os.getpid(), {number})
        time.sleep(20)
    decode_rows(self, latents, first_rows)
AutoencoderKL.decode_rows = slow
from lowtide.cli.app import main
sys.argv[1:] = {arguments!r}
main()
"""


def run_until(warm, number, folders, arguments):
    """The command in a process of its own, to which a signal comes when the first rows of a picture were written."""
    places = {"temporary": str(folders / "temporary"), "here": str(folders / "here")}
    return warm.run(SCRIPT.format(number=int(number), arguments=arguments, **places), folders, 120)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_leave_the_latents_alone(warm, model, number, code, folders):
    result = run_until(warm, number, folders, [*PICTURE, "--model", model, "--out", "x.png"])
    assert result.status == code, result.output
    (name,) = os.listdir(folders / "temporary")
    assert f"lowtide decode {folders / 'temporary' / name}" in result.output
    assert os.listdir() == []
    assert "Traceback" not in result.output


def test_what_a_killed_run_left_is_gone_after_the_next(warm, model, folders):
    options = [*PICTURE, "--model", model, "--ram", "64GB", "--out", "x.png"]
    assert run_until(warm, signal.SIGKILL, folders, options).status == -signal.SIGKILL
    assert len(os.listdir()) == len(os.listdir(folders / "temporary")) == 1
    assert lowtide(*options).exit_code == 0
    assert os.listdir() == ["x.png"]
    assert os.listdir(folders / "temporary") == []
