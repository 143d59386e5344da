"""`lowtide doctor`: its report, its advice and its measurements (made small)."""

import json
import os
from dataclasses import replace

import pytest
from typer.testing import CliRunner

from lowtide.cli import diagnosis
from lowtide.cli.app import app
from lowtide.cli.diagnosis import Gpu, Processor
from lowtide.machine import disk_and_link, dtype_speeds
from lowtide.planning import machine_rates

ALIKE = dict.fromkeys(dtype_speeds.DtypeSpeeds.__annotations__, 1e11)


@pytest.fixture
def small_probes(monkeypatch):
    monkeypatch.setattr(disk_and_link, "_COPY_BYTES", 2**20)
    monkeypatch.setattr(disk_and_link, "_FILE_BYTES", 2**20)
    monkeypatch.setattr(disk_and_link, "_CHUNK", 2**18)
    monkeypatch.setattr(disk_and_link, "matmul_rate", lambda dtype, size: 1e11)
    monkeypatch.setattr(dtype_speeds, "_asked", {})
    monkeypatch.setattr(dtype_speeds, "_measured_elsewhere", lambda: dict.fromkeys(dtype_speeds.DTYPES, ALIKE))
    monkeypatch.setattr(dtype_speeds, "keep", lambda *_: None)
    monkeypatch.setattr("lowtide.fitting.process.alone", lambda *_: (380_000_000, 0))
    monkeypatch.setattr(
        machine_rates, "machine_rates", lambda *_, refresh: replace(machine_rates.assumed_rates(), assumed=not refresh)
    )


def doctor(*arguments):
    return CliRunner().invoke(app, ["doctor", *arguments])


@pytest.mark.usefixtures("small_probes")
def test_json_has_every_part_and_leaves_no_file(tmp_path):
    result = doctor("--json", "--folder", str(tmp_path))
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["packages"]["torch"]
    assert found["memory"]["total"] >= found["memory"]["available"] > 0
    assert found["memory"]["copy_rate"] > 0
    assert found["processor"]["usable"] > 0
    assert set(found["processor"]["matmul"]) == set(found["processor"]["times"]) == {"float32", "bfloat16", "float16"}
    assert found["disk"]["read_rate"] or found["disk"]["note"]
    assert found["planning"]["rates"]["assumed"]
    assert not json.loads(doctor("--json", "--refresh", "--folder", str(tmp_path)).stdout)["planning"]["rates"][
        "assumed"
    ]
    assert found["advice"]
    assert os.listdir(tmp_path) == []


@pytest.mark.usefixtures("small_probes")
def test_the_table_fits_a_narrow_terminal(tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    result = doctor("--folder", str(tmp_path))
    assert result.exit_code == 0, result.output
    for word in ("Software", "CPU", "Memory", "GPU", "Disk", "Plans", "Advice", "GFLOP/s", "GB/s", " GB"):
        assert word in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 80


def test_a_folder_that_is_not_there():
    result = doctor("--folder", "/no/such/folder")
    assert result.exit_code == 2
    assert "no such folder" in result.stderr


def cpu(**times):
    return Processor("x", 2, (), {}, times=times)


@pytest.mark.parametrize(
    ("processor", "said", "unsaid"),
    [
        (cpu(float32=3.0, bfloat16=1.0, float16=90.0), ["in bfloat16", "float32 takes 3.0×", "not use float16"], []),
        (cpu(float32=1.0, bfloat16=60.0, float16=90.0), ["in float32", "bfloat16 takes 60.0×"], []),
        (cpu(float32=1.0, bfloat16=1.0, float16=1.0), ["in float32"], ["takes", "Do not use float16"]),
        (cpu(), ["could not be measured"], []),
    ],
)
def test_the_dtype_advice_follows_the_measured_speeds(processor, said, unsaid):
    advice = diagnosis._dtype_advice(processor, ())
    assert all(words in advice for words in said)
    assert not any(words in advice for words in unsaid)


def test_with_a_gpu_the_advice_is_for_the_gpu():
    gpu = Gpu("cuda:0", "GPU", "9.0", False, 2**34, 2**33, 1e10, 1e10)
    assert "On the GPU" in diagnosis._dtype_advice(cpu(float32=1.0), (gpu,))


def test_missing_packages_come_with_their_command(monkeypatch):
    (advice,) = diagnosis._install_advice({"hf_xet": None, "diffusers": "0.42.1"})
    assert advice.endswith("-m pip install hf_xet")
    assert diagnosis._version("no-such-package-at-all") is None


def test_a_gpu_that_pytorch_cannot_use_is_noticed(monkeypatch):
    monkeypatch.setattr(diagnosis.shutil, "which", lambda name: f"/usr/bin/{name}")
    (advice,) = diagnosis._gpu_advice(())
    assert "CUDA build" in advice


@pytest.mark.usefixtures("small_probes")
def test_a_file_still_in_memory_is_told(tmp_path, monkeypatch):
    if not hasattr(os, "posix_fadvise"):
        pytest.skip("needs posix_fadvise")
    monkeypatch.setattr(disk_and_link.os, "posix_fadvise", lambda *_: None)
    assert "still in memory" in disk_and_link.disk_read_rate(tmp_path).note
    monkeypatch.delattr(disk_and_link.os, "posix_fadvise")
    assert disk_and_link.disk_read_rate(tmp_path).read is None
