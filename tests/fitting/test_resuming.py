"""Memory runs out in the middle: the run goes on with a smaller plan, and what was made is not lost."""

import glob
import tempfile
import warnings
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from tests import tiny
from tests.fitting import fits
from tests.fitting.fits import bare_machine, traced_once  # noqa: F401
from tests.lines import interrupted, places
from tests.thinned import covering

from lowtide.fitting.meta_subject import meta_subject
from lowtide.fitting.prepare import prepare
from lowtide.fitting.resuming import _State
from lowtide.machine.memory_errors import OutOfMemoryError
from lowtide.planning.plan import Budgets
from lowtide.planning.planner import minimum
from lowtide.schedulers import DPMSolverMultistepScheduler

ERRORS = {
    "cuda": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    "cpu": RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory"),
    "python": MemoryError(),
    "system": OSError(12, "Cannot allocate memory"),
}
KINDS = ("pictures", "clips")
PARTS = {
    "pictures": {"encode prompt": "text_encoder", "denoise": "unet", "decode": "vae", "safety check": "safety_checker"},
    "clips": {"encode prompt": "text_encoder", "denoise": "transformer", "decode": "vae"},
}
STAGES = [f"{kind}: {stage}" for kind in KINDS for stage in PARTS[kind]]
pytestmark = pytest.mark.usefixtures("bare_machine", "traced_once")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {
        kind: fits.checkpoint(tmp_path_factory.mktemp(kind), kind, **({"checker": True} if kind == "pictures" else {}))
        for kind in KINDS
    }


@pytest.fixture(scope="module")
def plain(folders):
    return {kind: fits.make(fits.load(folders[kind], kind)) for kind in KINDS}


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def peak(plan, stage):
    return next(one.peak for one in plan.stages if one.name == stage)


def failing(monkeypatch, module, calls, error):
    """Have these calls of a module's inside (0 is the next) run out of memory; returns the list of calls."""
    done = []
    target = module.decoder if hasattr(module, "decoder") and hasattr(module, "encoder") else module
    kind = type(target)
    forward = kind.forward

    def fail(self, *args, **kwargs):
        if self is not target:
            return forward(self, *args, **kwargs)
        done.append(len(done))
        if calls is None or done[-1] in calls:
            raise error
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(kind, "forward", fail)
    return done


@pytest.mark.parametrize(("of_kind", "error"), covering(STAGES, ERRORS))
def test_every_stage_goes_on_with_less(folders, plain, of_kind, error, monkeypatch, own_folder):
    kind, stage = of_kind.split(": ")
    pipe = fits.load(folders[kind], kind)
    before = pipe.fit(ram="1GB", pictures=2 if kind == "pictures" else 1)
    module = getattr(pipe, PARTS[kind][stage])
    done = failing(monkeypatch, module, [1] if stage == "denoise" else [0], ERRORS[error])
    with pytest.warns(UserWarning, match=f"{stage}: memory ran out"):
        made = fits.make(pipe)
    assert fits.same(made, plain[kind])
    assert len(pipe.degradations) == 1
    assert peak(pipe.plan, stage) < peak(before, stage)
    if stage == "denoise":
        assert len(done) == 4  # three steps, one of them begun anew: those completed are kept
    assert not list(own_folder.glob("lowtide-latents-*"))


def test_an_interrupt_while_a_step_is_begun_anew():
    """The scheduler is never without its settings, also for a child that is forked then."""
    scheduler = tiny.scheduler()
    for place in places(_State(SimpleNamespace(scheduler=scheduler), ()).put_back, ("fitting/resuming",)):
        scheduler.set_timesteps(3)
        before, steps = _State(SimpleNamespace(scheduler=scheduler), ()), scheduler.timesteps
        scheduler.set_timesteps(5)
        scheduler.more = 1
        assert interrupted(before.put_back, place), str(place)
        assert scheduler.config.beta_schedule == "scaled_linear", str(place)
        before.put_back()
        assert scheduler.timesteps is steps
        assert not hasattr(scheduler, "more")


def test_twice_in_one_run(folders, plain, monkeypatch):
    pipe = fits.load(folders["pictures"], "pictures")
    pipe.fit(ram="1GB", pictures=2)
    failing(monkeypatch, pipe.unet, [0, 1, 3], ERRORS["cpu"])
    with pytest.warns(UserWarning, match="memory ran out"):
        made = fits.make(pipe)
    assert fits.same(made, plain["pictures"])
    assert len(pipe.degradations) == 3


@pytest.mark.parametrize("solver", [pytest.param("DDIM", marks=pytest.mark.slow), "an SDE"])
def test_a_step_of_the_scheduler_is_taken_once(folders, monkeypatch, solver):
    def draw(fails):
        pipe = fits.load(folders["pictures"], "pictures")
        if solver == "an SDE":
            entries = {"algorithm_type": "sde-dpmsolver++"}
            pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config, **entries)
        pipe.fit(ram="1GB", pictures=2)
        if fails:
            step, count = type(pipe.scheduler).step, []

            def broken(self, *args, **kwargs):
                made = step(self, *args, **kwargs)  # its state has moved on, and noise was drawn
                count.append(1)
                if len(count) == 2:
                    raise ERRORS["cpu"]
                return made

            monkeypatch.setattr(type(pipe.scheduler), "step", broken)
        return fits.make(pipe, eta=1.0, output_type="latent")

    whole = draw(fails=False)
    with pytest.warns(UserWarning, match="memory ran out"):
        assert torch.equal(draw(fails=True), whole)


def test_latents_outlive_a_decode_that_fails(folders, plain, monkeypatch, own_folder):
    pipe = fits.load(folders["pictures"], "pictures")
    pipe.fit(ram="1GB", pictures=2)
    with monkeypatch.context() as patched, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        failing(patched, pipe.vae, None, ERRORS["cpu"])
        with pytest.raises(OutOfMemoryError, match="smallest plan") as caught:
            fits.make(pipe)
    assert caught.value.latents is not None
    assert "decode_saved" in "".join(caught.value.__notes__)
    pipe.unfit()
    assert fits.same(pipe.decode_saved(caught.value.latents, "pt").images, plain["pictures"])
    assert [str(caught.value.latents)] == glob.glob(str(own_folder / "lowtide-latents-*"))


def test_clips_outlive_it_too(folders, plain, monkeypatch):
    pipe = fits.load(folders["clips"], "clips")
    with monkeypatch.context() as patched:
        failing(patched, pipe.vae, None, ERRORS["cpu"])
        with pytest.raises(RuntimeError, match="can't allocate") as caught:
            fits.make(pipe)
    (path,) = glob.glob(f"{tempfile.tempdir}/lowtide-latents-*")
    assert path in "".join(caught.value.__notes__)
    assert torch.equal(pipe.decode_saved(path, "pt").frames, plain["clips"])


def test_without_a_budget_the_error_goes_its_way_with_advice(folders, plain, monkeypatch):
    pipe = fits.load(folders["pictures"], "pictures")
    with monkeypatch.context() as patched:
        failing(patched, pipe.unet, [1], ERRORS["cuda"])
        with pytest.raises(torch.OutOfMemoryError) as caught:
            fits.make(pipe)
    assert "fit(" in "".join(caught.value.__notes__)
    assert torch.equal(fits.make(pipe), plain["pictures"])


def test_other_errors_are_not_taken_for_it(folders, monkeypatch):
    pipe = fits.load(folders["pictures"], "pictures")
    pipe.fit(ram="1GB")
    done = failing(monkeypatch, pipe.unet, [0], RuntimeError("shapes do not match"))
    with pytest.raises(RuntimeError, match="shapes"):
        fits.make(pipe)
    assert len(done) == 1


def test_foreign_files_hold_no_latents(folders, tmp_path):
    pipe = fits.load(folders["pictures"], "pictures")
    with pytest.raises(FileNotFoundError, match="no file"):
        pipe.decode_saved(tmp_path / "none.safetensors")
    (tmp_path / "text.safetensors").write_bytes(b"not this")
    with pytest.raises(ValueError, match="does not hold latents"):
        pipe.decode_saved(tmp_path / "text.safetensors")
    from safetensors.torch import save_file

    save_file({"latents": torch.zeros(1, 4, 4, 4)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="StableDiffusionPipeline"):
        pipe.decode_saved(tmp_path / "other.safetensors")
    assert tiny.MAX_TOKENS


def test_one_stage_at_its_least_leaves_the_others_planned(folders, plain, monkeypatch):
    pipe = fits.load(folders["pictures"], "pictures")
    stages = [one.name for one in pipe.fit(ram="1GB", pictures=2).stages]
    failing(monkeypatch, pipe.text_encoder, [0, 1, 2], ERRORS["cpu"])
    failing(monkeypatch, pipe.unet, [1], ERRORS["cpu"])
    with pytest.warns(UserWarning, match="memory ran out"):
        made = fits.make(pipe)
    assert fits.same(made, plain["pictures"])
    assert len(pipe.degradations) == 4
    assert [one.name for one in pipe.plan.stages if one.name in stages] == stages


def test_a_size_that_fits_what_was_given_is_not_refused_after_a_degradation(folders, monkeypatch):
    pipe = fits.load(folders["pictures"], "pictures")
    pipe.fit(ram="1GB", pictures=1)
    with monkeypatch.context() as patched, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        failing(patched, pipe.vae, [0, 1], ERRORS["cpu"])
        fits.make(pipe, num_images_per_prompt=1, generator=None)
    left = pipe.plan.peak
    fits.make(pipe, height=128, width=128, generator=None)
    assert left < pipe.plan.peak


def test_noise_of_the_default_generator_is_drawn_once(folders, monkeypatch):
    def draw(fails):
        pipe = fits.load(folders["pictures"], "pictures")
        pipe.fit(ram="1GB", pictures=2)
        step, count = type(pipe.scheduler).step, []

        def broken(self, *args, **kwargs):
            torch.rand(1)
            made = step(self, *args, **kwargs)
            count.append(1)
            if fails and len(count) == 2:
                raise ERRORS["cpu"]
            return made

        with monkeypatch.context() as patched:
            patched.setattr(type(pipe.scheduler), "step", broken)
            torch.manual_seed(0)
            fits.make(pipe, generator=None, output_type="latent")
        return torch.rand(1)

    whole = draw(fails=False)
    with pytest.warns(UserWarning, match="memory ran out"):
        assert torch.equal(draw(fails=True), whole)


def test_a_full_disk_does_not_end_the_run(folders, plain, monkeypatch, own_folder):
    from safetensors import SafetensorError

    def full(*_, **__):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    pipe = fits.load(folders["pictures"], "pictures")
    pipe.fit(ram="1GB", pictures=2)
    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.warns(UserWarning, match="No space left"):
        assert fits.same(fits.make(pipe), plain["pictures"])
    assert not list(own_folder.glob("lowtide-latents-*"))


def test_host_memory_that_runs_out_beside_a_gpu_is_what_shrinks(folders, monkeypatch):
    monkeypatch.setattr("lowtide.planning.options.STAGE_BYTES", 0)  # as large as all of these networks
    pipe = fits.load(folders["pictures"], "pictures")
    meta, rates = meta_subject(pipe, torch.device("cuda")), replace(fits.RATES, device="cuda")
    given = prepare(meta, Budgets(vram=10**8, ram=10**9, disk=10**9), pipe.usual_size(), rates=rates)
    most, least = given.choose().peak, minimum(given.workload, rates).vram
    fit = replace(given, budgets=replace(given.budgets, vram=(most + least) // 2))
    offloaded = fit.choose()
    smaller = fit.smaller(offloaded, "denoise", fit.budgets, of_host=True)
    assert smaller.stage("denoise").host < offloaded.stage("denoise").host
    assert smaller.peak <= offloaded.budgets.vram
    lowered = fit.limited(fit.budgets, smaller.host_peak, of_host=True)
    assert fit.limited(lowered, 5) == Budgets(vram=5, ram=smaller.host_peak, disk=10**9)  # what ran out stays lowered
