"""How commands end: signals, what is advised when memory runs out, and warnings as one line."""

import os
import signal
import threading
import time
import warnings

import pytest
import typer

from lowtide.cli import app
from lowtide.cli.errors import reported


def ended(capsys, error, **options):
    """The exit code and what is said, when a command raises."""
    with pytest.raises(typer.Exit) as caught, reported(debug=False, **options):
        raise error
    return caught.value.exit_code, capsys.readouterr().err


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")], ids=repr)
def test_a_budget_is_advised_where_none_was_given(error, capsys):
    import torch  # noqa: F401  a run has imported it

    code, said = ended(capsys, error)
    assert code == 1
    assert "--ram 4GB" in said
    code, said = ended(capsys, error, has_budget=True)
    assert "--ram" not in said
    assert "smaller --size" in said
    assert "--allow" in said


def test_memory_that_a_library_did_not_get_on_a_gpu_leads_there_too(capsys):
    error = RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")
    assert "--vram 4GB" in ended(capsys, error)[1]
    error = RuntimeError("XPU out of memory. Tried to allocate 4.00 GiB.")
    assert "--vram 4GB" in ended(capsys, error)[1]


def test_memory_of_a_gpu_leads_to_a_budget_of_it(capsys):
    import torch

    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
    assert "--vram 4GB" in ended(capsys, error)[1]
    error.latents = "/tmp/my latents"
    assert "lowtide decode '/tmp/my latents' --vram auto" in ended(capsys, error)[1]


def test_weights_of_another_model_are_one_line(capsys):
    from lowtide.weights.fill import WeightsMismatchError

    lists = "\nIn the model, not in the file (2):\n  a\n  b"
    code, said = ended(
        capsys, WeightsMismatchError(f"A model and its weights in x do not match: a (and 1 more).{lists}")
    )
    assert code == 2
    assert said == "Error: A model and its weights in x do not match: a (and 1 more).\n"


def test_sigterm_ends_as_ctrl_c_does_and_the_handler_is_put_back(capsys):
    before = signal.getsignal(signal.SIGTERM)
    tidied = []

    def wait():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(10)
        finally:
            tidied.append(True)

    with pytest.raises(typer.Exit) as caught, reported(debug=False):
        wait()
    assert caught.value.exit_code == 143
    assert tidied
    assert "Stopped." in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) is before


def test_in_another_thread_signals_are_left_alone(capsys):
    codes = []

    def command():
        try:
            with reported(debug=False):
                raise ValueError("no")
        except typer.Exit as exit_:
            codes.append(exit_.exit_code)

    thread = threading.Thread(target=command)
    thread.start()
    thread.join()
    assert codes == [2]


def test_a_warning_is_one_line(capsys):
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = app._show_warning
        warnings.warn("a long\n  message", stacklevel=1)
    assert capsys.readouterr().err == "Warning: a long message\n"
