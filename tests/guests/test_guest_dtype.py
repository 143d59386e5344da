"""The dtype of guests: the fastest on made-up processors, with the bits of the same one asked for."""

import pytest
import torch
from tests.guests.families import FAMILIES
from tests.guests.family import modules_of, saved_and_loaded
from tests.guests.guest_cases import WARNINGS
from tests.planning import processors

import lowtide
from lowtide.guests.checkpoint import GuestCheckpoint
from lowtide.guests.guest_dtype import guest_dtypes, in_dtype, load_in_fastest
from lowtide.hub import Source
from lowtide.memory.attach import attachment_of
from lowtide.memory.store import DiskRest
from lowtide.planning.plan import BudgetError, Budgets

pytest.importorskip("diffusers")
pytestmark = [*WARNINGS, pytest.mark.usefixtures("traced_once")]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    family = FAMILIES["SDXL"]()
    return family, saved_in(family, tmp_path_factory.mktemp("guest"))


def saved_in(family, folder):
    saved_and_loaded(family, folder)
    return folder


def chosen(folder, device=CPU, **arguments):
    checkpoint = GuestCheckpoint.opened(Source(str(folder)), arguments)
    return guest_dtypes(checkpoint, checkpoint.parts(), device)


def test_the_fastest_is_first_and_the_files_own_where_it_is_as_fast(family, monkeypatch):
    _, folder = family
    processors.use(monkeypatch, processors.FOR_BFLOAT16)
    assert chosen(folder) == (torch.bfloat16, None)
    processors.use(monkeypatch, processors.speeds(float32=1, bfloat16=1))
    assert chosen(folder) == (None, torch.bfloat16)
    processors.use(monkeypatch, None)
    assert chosen(folder)[0] is None


def test_elsewhere_and_with_a_network_that_was_given_it_is_that_of_the_files(family, monkeypatch):
    own, folder = family
    processors.use(monkeypatch, processors.FOR_BFLOAT16)
    assert chosen(folder, torch.device("cuda")) == (None,)
    assert chosen(folder, vae=own.pipeline.vae) == (None,)


def test_what_is_loaded_computes_in_it_as_if_it_were_asked_for(family, monkeypatch):
    own, folder = family

    def made(pipe):
        pipe.set_progress_bar_config(disable=True)
        return own.result(pipe(**own.call, generator=torch.Generator().manual_seed(0)))

    processors.use(monkeypatch, processors.FOR_BFLOAT16)
    asked = {"ram": "16GB", "native": False, "device": "cpu", **own.call}
    pipe = lowtide.load(folder, **asked)
    assert lowtide.plan_of(pipe).dtype == "bfloat16"
    picture = made(pipe)
    assert torch.equal(picture, made(lowtide.load(folder, dtype=torch.bfloat16, **asked)))
    assert not torch.equal(picture, made(lowtide.load(folder, dtype="auto", **asked)))


def test_weights_rest_as_the_file_has_them(family, monkeypatch):
    own, folder = family
    processors.use(monkeypatch, processors.FOR_BFLOAT16)
    with pytest.raises(BudgetError) as refusal:
        lowtide.load(folder, ram="10MB", native=False, device="cpu", **own.call)
    pipe = lowtide.load(folder, ram=refusal.value.minimum.ram, native=False, device="cpu", **own.call)
    streamed = [attachment for part in modules_of(pipe).values() if (attachment := attachment_of(part)) is not None]
    weights = [weight for attachment in streamed for weight in attachment.weights]
    rests = [weight.rest for weight in weights if weight.views[0].slot.kind == "parameter"]
    assert rests
    assert all(isinstance(rest, DiskRest) and rest.origin.file.path.is_relative_to(folder) for rest in rests)


def test_memory_decides_where_only_another_dtype_fits(family, monkeypatch):
    own, folder = family
    processors.use(monkeypatch, processors.speeds(float32=1, bfloat16=2))
    checkpoint = GuestCheckpoint.opened(Source(str(folder)), dict(own.call))
    parts = checkpoint.parts()

    def least(dtype):
        with pytest.raises(BudgetError) as refusal:
            in_dtype(checkpoint, parts, dtype).load(Budgets(ram=10**7), (), CPU)
        return refusal.value.minimum.ram

    in_bfloat16, in_files = least(torch.bfloat16), least(None)
    assert in_bfloat16 < in_files
    found, tried, pipe = load_in_fastest(checkpoint, Budgets(ram=(in_bfloat16 + in_files) // 2), (), CPU)
    assert tried == (None, torch.bfloat16)
    assert found == pipe.unet.dtype == torch.bfloat16
