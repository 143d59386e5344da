"""A user in no list of users, without $HOME, or with a home that cannot be written to: every command goes on."""

import os
import shutil

import pytest
from tests.document.processes import Warm
from tests.fitting import fits

UNKNOWN = 54321
SCRIPT = """
import sys
from tests.fitting.fits import RATES
from lowtide.fitting import process
from lowtide.machine import dtype_speeds
from lowtide.machine.processor_share import Share
from lowtide.planning import machine_rates
machine_rates._measured_elsewhere = lambda *_: (RATES, Share(0.0, 0.1))  # what takes long
ALIKE = dict.fromkeys(dtype_speeds.DtypeSpeeds.__annotations__, 1e11)
dtype_speeds._measured_elsewhere = lambda: dict.fromkeys(dtype_speeds.DTYPES, ALIKE)
process.run_module = lambda *_, **__: "400000000 0"
from lowtide.cli.app import main
sys.argv[1:] = {arguments!r}
main()
"""
HOMES = {"none": {}, "unwritable": {"HOME": "/proc/nothing/here"}}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    fits.small(folder / "parts").save_pretrained(folder / "model")
    return str(folder / "model")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder that everybody can write to."""
    folder = tmp_path_factory.mktemp("place")
    for each in (*list(folder.parents)[:2], folder):
        each.chmod(0o777)
    return folder


@pytest.fixture(scope="module", params=["none", pytest.param("unwritable", marks=pytest.mark.slow)])
def lowtide(request, place):
    """The command, of an unknown user where we may become one, who may read everything: its status and what it says."""
    become = []
    if _is_another():
        ids = [f"--reuid={UNKNOWN}", f"--regid={UNKNOWN}", "--clear-groups"]
        become = ["setpriv", *ids, "--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search"]
    variables = {
        "PATH": os.environ["PATH"],
        "PYTHONDONTWRITEBYTECODE": "1",
        "OMP_NUM_THREADS": "1",
        "TMPDIR": str(place),
        "COLUMNS": "500",
        **HOMES[request.param],
    }
    runner = Warm(become, variables)

    def run(*arguments):
        return runner.run(SCRIPT.format(arguments=arguments), place, 100)

    yield run
    runner.close()


def _is_another():
    return os.geteuid() == 0 and shutil.which("setpriv") is not None


def warnings_of(result):
    assert "Traceback" not in result.output
    assert "home directory" not in result.output
    return [line for line in result.output.splitlines() if line.startswith("Warning: ")]


@pytest.mark.parametrize("command", ["plan", "generate", pytest.param("doctor", marks=pytest.mark.slow)])
def test_every_command_goes_on_and_says_once_that_nothing_is_kept(command, lowtide, model):
    arguments = {
        "plan": ["plan", model, "--ram", "64GB", "--device", "cpu"],
        "generate": [*f"generate sea --model {model} --steps 1 --ram 64GB --device cpu --out x.png".split()],
        "doctor": ["doctor"],
    }[command]
    result = lowtide(*arguments)
    assert result.status == 0, result.output
    (said,) = warnings_of(result)
    assert said.startswith("Warning: What was measured of this machine cannot be kept (")
    assert said.endswith("Set XDG_CACHE_HOME to a folder that can be written to.")


def test_a_model_of_the_hub_is_kept_in_the_folder_for_temporary_files(lowtide, place):
    result = lowtide("plan", "owner/no-such-model")
    assert "No model at 'owner/no-such-model'" in result.output
    (said,) = warnings_of(result)
    folder = next(folder for folder in place.glob("lowtide-hub-*") if str(folder) in said)
    assert "files from the Hub are kept in" in said
    assert (folder.stat().st_mode & 0o777) == 0o700


@pytest.mark.parametrize("lowtide", ["none"], indirect=True)
@pytest.mark.parametrize("arguments", [["plan", "~/model"], ["generate", "sea", "--model", "~/model"]])
def test_a_path_that_begins_with_a_home_that_is_not_there(arguments, lowtide):
    result = lowtide(*arguments)
    if _is_another():
        assert result.status == 2
        assert "~/model: there is no home folder here" in result.output
    assert warnings_of(result) == []
