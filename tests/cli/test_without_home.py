"""A user in no list of users, without $HOME, or with a home that cannot be written to: every command goes on."""

import os
import shutil
import subprocess
import sys

import pytest
from tests import tiny

UNKNOWN = 54321
PROGRAM = """
from tests.fitting.fits import RATES
from lowtide.fitting import process
from lowtide.planning import machine_rates
machine_rates._measured_elsewhere = lambda *_: RATES  # what takes long
process.run_module = lambda *_, **__: "400000000 0"
from lowtide.cli.app import main
main()
"""
HOMES = ({}, {"HOME": "/proc/nothing/here"})


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    tiny.pipeline(folder / "parts").save_pretrained(folder / "model")
    return str(folder / "model")


@pytest.fixture
def place(tmp_path):
    """A folder that everybody can write to."""
    for folder in (*list(tmp_path.parents)[:2], tmp_path):
        folder.chmod(0o777)
    return tmp_path


def lowtide(place, home, *arguments):
    """The command, as an unknown user where we may become one, who may read everything."""
    become = []
    if os.geteuid() == 0 and shutil.which("setpriv"):
        ids = [f"--reuid={UNKNOWN}", f"--regid={UNKNOWN}", "--clear-groups"]
        become = ["setpriv", *ids, "--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search"]
    environment = {
        "PATH": os.environ["PATH"],
        "PYTHONPATH": os.pathsep.join([os.environ.get("PYTHONPATH", ""), os.getcwd()]),
        "PYTHONDONTWRITEBYTECODE": "1",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "TMPDIR": str(place),
        **home,
    }
    command = [*become, sys.executable, "-c", PROGRAM, *arguments]
    return subprocess.run(command, env=environment, cwd=place, capture_output=True, text=True, timeout=300, check=False)


def warnings_of(result):
    assert "Traceback" not in result.stderr
    assert "home directory" not in result.stderr
    return [line for line in result.stderr.splitlines() if line.startswith("Warning: ")]


@pytest.mark.parametrize("home", HOMES, ids=["none", "unwritable"])
@pytest.mark.parametrize("command", ["plan", "generate", pytest.param("doctor", marks=pytest.mark.slow)])
def test_every_command_goes_on_and_says_once_that_nothing_is_kept(command, home, model, place):
    arguments = {
        "plan": ["plan", model, "--ram", "64GB", "--device", "cpu"],
        "generate": [*f"generate sea --model {model} --steps 1 --ram 64GB --device cpu --out x.png".split()],
        "doctor": ["doctor"],
    }[command]
    result = lowtide(place, home, *arguments)
    assert result.returncode == 0, result.stderr
    (said,) = warnings_of(result)
    assert said.startswith("Warning: What was measured of this machine cannot be kept (")
    assert said.endswith("Set XDG_CACHE_HOME to a folder that can be written to.")


@pytest.mark.parametrize("home", HOMES, ids=["none", "unwritable"])
def test_a_model_of_the_hub_is_kept_in_the_folder_for_temporary_files(home, place):
    result = lowtide(place, home, "plan", "owner/no-such-model")
    assert "No model at 'owner/no-such-model'" in result.stderr
    (said,) = warnings_of(result)
    assert f"files from the Hub are kept in {place}/lowtide-hub-" in said
    assert (next(place.glob("lowtide-hub-*")).stat().st_mode & 0o777) == 0o700


def test_a_path_that_begins_with_a_home_that_is_not_there(place):
    for arguments in (["plan", "~/model"], ["generate", "sea", "--model", "~/model"]):
        result = lowtide(place, {}, *arguments)
        if os.geteuid() == 0 and shutil.which("setpriv"):
            assert result.returncode == 2
            assert "~/model: there is no home folder here" in result.stderr
        assert warnings_of(result) == []
