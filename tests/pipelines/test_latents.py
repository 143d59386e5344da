"""Latents while they decode: whatever happens to the decode, to writing or to removing, they are not lost."""

import os
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lowtide.pipelines import latents as module
from lowtide.pipelines.latents import kept_safe, load_latents, run_of_latents, save_latents, telling_latents

LATENTS = torch.arange(8.0).reshape(1, 2, 2, 2)
FITTED, PLAIN = (SimpleNamespace(plan=plan, device=torch.device("cpu")) for plan in ("a plan", None))


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def decode(pipe, error, saved=None):
    """Latents that are being decoded when something is raised; returns what was raised."""
    with pytest.raises(type(error)) as caught, kept_safe(pipe, LATENTS, saved):
        raise error
    return caught.value


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("pipe", [FITTED, PLAIN], ids=["budget", "none"])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), MemoryError(), OSError("full"), ValueError("no")], ids=repr)
def test_however_it_ends_they_are_kept_and_named(pipe, error, own_folder):
    raised = decode(pipe, error)
    (path,) = own_folder.iterdir()
    assert raised.latents == path
    assert str(os.getpid()) not in path.name
    assert f"pipe.decode_saved({str(path)!r})" in raised.__notes__[-1]
    assert torch.equal(load_latents(pipe, path), LATENTS)


def test_an_exit_which_python_does_not_show_warns(own_folder):
    with pytest.warns(UserWarning, match="The latents are kept in .*decode_saved"):
        decode(FITTED, SystemExit(3))
    assert len(names(own_folder)) == 1


def test_a_decode_that_ends_well_leaves_nothing(own_folder):
    for pipe, count in ((FITTED, 1), (PLAIN, 0)):
        with kept_safe(pipe, LATENTS):
            assert len(names(own_folder)) == count
            assert all(f"-{os.getpid()}-" in name for name in names(own_folder))
        assert names(own_folder) == []


def test_those_of_a_file_are_not_written_twice(own_folder):
    path = own_folder / "mine.safetensors"
    path.write_text("latents")
    assert decode(FITTED, KeyboardInterrupt(), path).latents == path
    with kept_safe(FITTED, LATENTS, path):
        pass
    assert names(own_folder) == ["mine.safetensors"]


def test_a_file_that_cannot_be_removed_costs_no_result(own_folder, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "unlink", refuse)
    with pytest.warns(UserWarning, match="cannot be removed.*Permission denied"), kept_safe(FITTED, LATENTS):
        pass


@pytest.mark.parametrize("when", ["before", "after"])
def test_interrupted_while_the_file_is_removed_they_are_kept(when, own_folder, monkeypatch):
    unlink, calls = Path.unlink, []

    def interrupted(self, missing_ok=False):
        calls.append(self)
        if when == "after" or len(calls) > 1:
            unlink(self, missing_ok=missing_ok)
        if len(calls) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(Path, "unlink", interrupted)
    with pytest.raises(KeyboardInterrupt) as caught, kept_safe(FITTED, LATENTS):
        pass
    assert [caught.value.latents.name] == names(own_folder)
    assert torch.equal(load_latents(FITTED, caught.value.latents), LATENTS)


def test_interrupted_while_they_are_written_they_are_written_again(own_folder, monkeypatch):
    import safetensors.torch

    save, calls = safetensors.torch.save_file, []

    def interrupted(*args, **kwargs):
        calls.append(1)
        if len(calls) == 1:
            raise KeyboardInterrupt
        save(*args, **kwargs)

    monkeypatch.setattr(safetensors.torch, "save_file", interrupted)
    with pytest.raises(KeyboardInterrupt) as caught, kept_safe(FITTED, LATENTS):
        raise AssertionError("not reached")
    assert [caught.value.latents.name] == names(own_folder)


def test_where_they_cannot_be_written_the_decode_goes_on(own_folder, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(own_folder / "missing"))
    decoded = []
    with pytest.warns(UserWarning, match="cannot be kept"), kept_safe(FITTED, LATENTS):
        decoded.append(True)
    assert decoded
    with pytest.warns(UserWarning, match="cannot be kept"):
        assert not hasattr(decode(FITTED, ValueError("the first error")), "latents")


def test_without_any_folder_for_temporary_files_too(monkeypatch):
    def nowhere():
        raise FileNotFoundError(2, "No usable temporary directory found")

    monkeypatch.setattr(tempfile, "gettempdir", nowhere)
    with pytest.warns(UserWarning, match="cannot be kept"), kept_safe(FITTED, LATENTS):
        pass


def test_one_that_cannot_be_renamed_is_named_as_it_is(own_folder, monkeypatch):
    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.warns(UserWarning, match="copy it"):
        raised = decode(FITTED, KeyboardInterrupt())
    assert torch.equal(load_latents(FITTED, raised.latents), LATENTS)


def test_what_the_run_says_is_in_the_file():
    with telling_latents({"model": "m", "seeds": [3]}):
        told = save_latents(PLAIN, LATENTS)
    untold = save_latents(PLAIN, LATENTS)
    assert run_of_latents(told) == {"model": "m", "seeds": [3]}
    assert run_of_latents(untold) is None


def test_files_of_dead_processes_go_and_those_kept_stay_a_week(own_folder):
    machine = module.writer().partition("-")[0]
    kept = decode(PLAIN, KeyboardInterrupt()).latents
    (own_folder / f"lowtide-latents-{machine}-999999999-abcd1234.safetensors").write_text("half")
    (own_folder / f"lowtide-latents-{machine}-{os.getppid()}-abcd1234.safetensors").write_text("at work")
    with kept_safe(FITTED, LATENTS):
        assert len(names(own_folder)) == 3
    assert len(names(own_folder)) == 2
    os.utime(kept, (0, 0))
    with kept_safe(FITTED, LATENTS):
        pass
    assert names(own_folder) == [f"lowtide-latents-{machine}-{os.getppid()}-abcd1234.safetensors"]


@pytest.mark.parametrize("about", ["[1]", "no json", "3"])
def test_a_file_that_says_something_else_holds_no_latents(about, own_folder):
    from safetensors.torch import save_file

    save_file({"latents": LATENTS}, own_folder / "x.safetensors", metadata={"lowtide": about})
    with pytest.raises(ValueError, match="does not hold latents"):
        load_latents(PLAIN, own_folder / "x.safetensors")
