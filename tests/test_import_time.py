"""`import lowtide` brings in nothing heavy; every public name is there when it is asked for."""

import subprocess
import sys

import pytest

import lowtide

HEAVY = ("torch", "transformers", "numpy", "PIL", "rich", "huggingface_hub", "safetensors", "diffusers", "av")


def loaded_after(statement):
    code = f"import sys; {statement}; print(*sorted(name for name in {HEAVY!r} if name in sys.modules))"
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()


def test_importing_lowtide_imports_nothing_heavy():
    assert loaded_after("import lowtide") == []


def test_the_check_sees_a_heavy_import():
    assert loaded_after("import lowtide, numpy") == ["numpy"]


def test_importing_the_command_imports_no_torch():
    assert not {"torch", "transformers", "numpy", "PIL"} & set(loaded_after("import lowtide.cli.app"))


def test_a_model_is_refused_without_torch():
    code = (
        "from typer.testing import CliRunner; from lowtide.cli.app import app; "
        "commands = (['plan', 'nothere'], ['generate', 'x', '--model', 'nothere']); "
        "results = [CliRunner().invoke(app, words) for words in commands]; "
        "assert [result.exit_code for result in results] == [2, 2], results"
    )
    assert not {"torch", "transformers", "numpy"} & set(loaded_after(code))


def test_the_meter_needs_no_torch():
    code = (
        "from lowtide.memory import Meter; from lowtide.stages import Stages\nwith Stages([Meter()]).stage('x'): pass"
    )
    assert "torch" not in loaded_after(f"exec({code!r})")


@pytest.mark.parametrize("name", lowtide.__all__)
def test_every_public_name_can_be_had(name):
    assert getattr(lowtide, name) is not None
    assert name in dir(lowtide)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'StableDifusion'"):
        _ = lowtide.StableDifusion
