"""The commands run our own models where `transformers` cannot be imported, nor what only it needs."""

import os
import subprocess
import sys

import pytest
from tests import tiny, tiny_video
from tests.serve.server import Server

ABSENT = ("transformers", "diffusers", "sentencepiece", "torch._dynamo", "sympy")
OF_TORCH = ("torch._dynamo", "sympy")
"""What PyTorch imports for tensors on meta, which planning needs."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    tiny.pipeline(folder / "words", checker=True).save_pretrained(folder / "pictures")
    tiny_video.write_checkpoint(folder / "clips")
    return folder


@pytest.fixture(scope="module")
def without(tmp_path_factory):
    """An environment where the library is in the way, also for processes that a command starts."""
    folder = tmp_path_factory.mktemp("absent")
    for name in ("transformers", "diffusers", "sentencepiece"):
        (folder / f"{name}.py").write_text(f"raise ImportError('{name} is not to be imported')")
    paths = [str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}


RUNS = {
    "generate": ["generate", "sea", "--steps", "1", "--out", "sea.png"],
    "generate within a budget": ["generate", "sea", "--steps", "1", "--ram", "4GB", "--out", "sea.png"],
    "generate with a checker": ["generate", "sea", "--steps", "1", "--model", "pictures", "--out", "sea.png"],
    "generate a clip": ["generate", "sea", "--video", "--steps", "1", "--model", "clips", "--out", "sea.mp4"],
    "plan": ["plan", "--ram", "4GB"],
    "plan a clip": ["plan", "clips", "--ram", "4GB"],
}


@pytest.mark.parametrize("name", RUNS)
def test_a_command_needs_no_transformers(folders, without, name):
    code = (
        "import sys; from lowtide.cli.app import main\n"
        "try: main()\n"
        f"finally: print('imported', *(name for name in {ABSENT!r} if name in sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *RUNS[name]], cwd=folders, env=without, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    imported = set(done.stdout.splitlines()[-1].split()[1:])
    planned = "--ram" in RUNS[name]
    assert imported <= (set(OF_TORCH) if planned else set()), imported


def test_the_check_sees_an_import(without):
    code = "import lowtide.models.attention_backends as a; a._register()"
    done = subprocess.run([sys.executable, "-c", code], env=without, capture_output=True, text=True, check=False)
    assert "transformers is not to be imported" in done.stderr


def test_a_server_needs_no_transformers(tmp_path, without, monkeypatch):
    pytest.importorskip("fastapi")
    for name, value in without.items():
        monkeypatch.setenv(name, value)
    server = Server(tmp_path / "data")
    try:
        server.wait_until_ready()
        status, job = server.ask("POST", "/jobs", {"prompt": "sea"})
        assert status == 202, job
        assert server.ended(job["id"])["state"] == "done", server.said
    finally:
        server.stop()
