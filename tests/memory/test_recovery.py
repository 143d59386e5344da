"""What may go wrong while weights are streamed. After each: everything at rest, nothing leaked, the next run equal."""

from __future__ import annotations

import errno
import os
import shutil
import textwrap
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests import tiny, tiny_video
from tests.document.processes import Warm
from tests.memory.cases import CASES, CPU, RULES, Toy, all_at_rest, plain, put
from tests.thinned import covering

from lowtide import UNet2DConditionModel
from lowtide.memory import Attachment, Rule, apply_residency, attachment_of, detach
from lowtide.memory.attach import attach
from lowtide.memory.placeholder import AtRest
from lowtide.memory.rule import Level, Tier
from lowtide.memory.store import DiskRest
from lowtide.memory.stream import Stream
from lowtide.weights import files
from lowtide.weights.index import CheckpointError

NAMES = ["sequential", "model", "blocks ahead", "pairs of blocks ahead", "leaves ahead"]


class StopError(Exception):
    pass


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "unet"
    tiny.unet(**tiny.FEW_BLOCKS).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A checkpoint that a test may damage."""
    return shutil.copytree(saved, tmp_path / "unet")


def loaded(folder: Path, rule: Rule, *, zero_copy: bool = True) -> tuple[UNet2DConditionModel, Attachment]:
    """The tiny U-Net from disk, at rest in its checkpoint."""
    module = UNet2DConditionModel.from_pretrained(folder)
    attachment = put(module, rule, zero_copy=zero_copy)
    assert all(isinstance(w.rest, DiskRest) for unit in attachment.units for w in unit.weights)
    assert {w.rest.origin.file.path.parent for unit in attachment.units for w in unit.weights} == {folder}
    return module, attachment


def pipeline(folder: Path) -> Any:
    """A pipeline of few blocks."""
    return tiny.pipeline(folder)


@pytest.fixture(scope="module")
def halves(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.Tensor]:
    """A pipeline in files, which are read alone, and what it draws in bfloat16."""
    from lowtide import StableDiffusionPipeline

    folder = tmp_path_factory.mktemp("halves")
    pipeline(folder / "parts").save_pretrained(folder / "pipe")
    half = StableDiffusionPipeline.from_pretrained(folder / "pipe", torch_dtype=torch.bfloat16)
    return folder / "pipe", draw(_quiet(half))


def run(module: Any) -> torch.Tensor:
    with torch.no_grad():
        return module(**tiny.unet_inputs()).sample


def fails_once(module: torch.nn.Module, error: type[BaseException]) -> None:
    """Let the next call of `module` raise."""

    def hook(*_: Any) -> None:
        handle.remove()
        raise error

    handle = module.register_forward_hook(hook)


@pytest.mark.parametrize(
    ("rule", "zero_copy", "error"), covering(NAMES, [True, False], [StopError, KeyboardInterrupt, MemoryError])
)
def test_an_exception_in_the_middle(folder: Path, rule: str, error: type[BaseException], *, zero_copy: bool) -> None:
    module, attachment = loaded(folder, RULES[rule], zero_copy=zero_copy)
    expected = plain("unet", "fp32")
    for _ in range(2):
        assert torch.equal(run(module), expected)
    for inner in (module.up_blocks[1].resnets[0].conv1, module.mid_block, module.conv_in):
        fails_once(inner, error)
        with pytest.raises(error):
            run(module)
        assert all_at_rest(attachment)
        assert attachment.stream.ledger.in_use <= attachment.bound
        assert torch.equal(run(module), expected)
        assert all_at_rest(attachment)


@pytest.mark.parametrize("error", [StopError, KeyboardInterrupt])
@pytest.mark.parametrize("plan", ["enable_model_cpu_offload", "enable_sequential_cpu_offload"])
def test_a_callback_that_raises(tmp_path: Path, plan: str, error: type[BaseException]) -> None:
    pipe = pipeline(tmp_path)
    pipe.set_progress_bar_config(disable=True)
    expected = draw(pipe)
    getattr(pipe, plan)(device="cpu")

    def raises(*_: Any) -> None:
        raise error

    with pytest.raises(error):
        draw(pipe, callback_on_step_end=raises)
    for module in pipe.modules().values():
        attachment = attachment_of(module)
        assert attachment is not None
        assert all_at_rest(attachment)
        assert attachment.stream.ledger.in_use == 0
    assert torch.equal(draw(pipe), expected)
    pipe.disable_model_cpu_offload()
    assert torch.equal(draw(pipe), expected)


def draw(pipe: Any, **options: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return pipe("a red boat", num_inference_steps=2, generator=generator, output_type="pt", **options).images


@pytest.mark.parametrize("rule", NAMES)
def test_a_file_that_is_removed_goes_on_working(folder: Path, rule: str) -> None:
    module, _ = loaded(folder, RULES[rule])
    for file in folder.iterdir():
        file.unlink()
    assert torch.equal(run(module), plain("unet", "fp32"))


@pytest.mark.parametrize(("rule", "how"), covering(NAMES, ["truncate", "overwrite"]))
def test_a_file_that_is_cut_off_or_overwritten_is_an_error_and_no_crash(
    folder: Path, tmp_path: Path, warm: Warm, rule: str, how: str
) -> None:
    """In a process of its own: touching a mapping behind the end of its file would kill it."""
    program = f"""
        import os, torch
        from tests import tiny
        from tests.memory.cases import RULES
        from tests.memory.test_recovery import all_at_rest, loaded, run
        from pathlib import Path
        from lowtide.weights.index import CheckpointError
        folder = Path({str(folder)!r})
        module, attachment = loaded(folder, RULES[{rule!r}])
        expected = run(module)
        file = next(folder.glob("*.safetensors"))
        size = file.stat().st_size
        if {how!r} == "truncate":
            os.truncate(file, 4096)
        else:
            with file.open("r+b") as stream:
                stream.seek(size // 2)
                stream.write(b"other bytes")
            os.utime(file, ns=(1, 1))
        for _ in range(2):
            try:
                run(module)
            except CheckpointError as error:
                print("refused:", error)
            assert all_at_rest(attachment)
    """
    output = warm.run(textwrap.dedent(program), tmp_path, 300).check()
    assert output.count("refused:") == 2
    assert ("shorter" if how == "truncate" else "written to") in output


def test_a_plain_pipeline_refuses_a_file_that_was_cut_off(tmp_path: Path, halves: tuple[Path, torch.Tensor]) -> None:
    from lowtide import StableDiffusionPipeline

    half = StableDiffusionPipeline.from_pretrained(halves[0], torch_dtype=torch.bfloat16)
    half.save_pretrained(tmp_path / "half")  # 16-bit numbers are mapped wherever they lie
    pipe = StableDiffusionPipeline.from_pretrained(tmp_path / "half", torch_dtype=torch.bfloat16)
    pipe.set_progress_bar_config(disable=True)
    os.truncate(next((tmp_path / "half" / "unet").glob("*.safetensors")), 4096)
    with pytest.raises(CheckpointError, match="shorter"):
        draw(pipe)


@pytest.mark.parametrize(("rule", "zero_copy"), covering(NAMES, [True, False]))
def test_a_disk_that_fails_in_the_middle(
    folder: Path, rule: str, monkeypatch: pytest.MonkeyPatch, *, zero_copy: bool
) -> None:
    module, attachment = loaded(folder, RULES[rule], zero_copy=zero_copy)
    expected = run(module)
    real: dict[str, Callable[..., Any]] = {"read": files.WeightFile.read_into, "check": files.WeightFile.check}
    calls = 0

    def sometimes(name: str) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls > (5 if rule != "model" else 0):
                raise OSError(errno.EIO, "injected")
            return real[name](*args)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(files.WeightFile, "check", sometimes("check"))
        patch.setattr(files.WeightFile, "read_into", sometimes("read"))
        with pytest.raises(OSError, match="injected"):
            run(module)
        assert all_at_rest(attachment)
    assert torch.equal(run(module), expected)
    assert all_at_rest(attachment)


def test_a_full_disk_leaves_the_module_as_it_was(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    case = CASES["unet"](torch.float32)
    real, written = os.pwrite, 0

    def full(*args: Any) -> int:
        nonlocal written
        written += 1
        if written > 20:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*args)

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OSError, match="cannot be written") as caught:
        apply_residency(case.module, rest="disk", device="cpu", spill_folder=str(tmp_path))
    assert "rest='host'" in str(caught.value)
    assert attachment_of(case.module) is None
    assert not any(isinstance(parameter, AtRest) for parameter in case.module.parameters())
    assert torch.equal(case.run(), plain("unet", "fp32"))
    assert list(tmp_path.iterdir()) == []


def test_two_pipelines_share_a_component(tmp_path: Path) -> None:
    one = pipeline(tmp_path)
    other = type(one)(**{**one.components, "scheduler": type(one.scheduler).from_config(one.scheduler.config)})
    for pipe in (one, other):
        pipe.set_progress_bar_config(disable=True)
    expected = draw(one)
    one.enable_model_cpu_offload(device="cpu")
    assert torch.equal(draw(other), expected)
    other.enable_group_offload("cpu", offload_type="leaf_level", use_stream=True)
    assert torch.equal(draw(one), expected)
    assert torch.equal(draw(other), expected)
    one.enable_sequential_cpu_offload(device="cpu")
    threads_draw([one, other], expected)
    other.disable_group_offload()
    assert torch.equal(draw(one), expected)


def test_two_threads_call_one_pipeline(tmp_path: Path) -> None:
    pipe = pipeline(tmp_path)
    pipe.set_progress_bar_config(disable=True)
    expected = draw(pipe)
    for plan in (pipe.enable_model_cpu_offload, pipe.enable_sequential_cpu_offload):
        plan(device="cpu")
        threads_draw([pipe, pipe], expected)


def threads_draw(pipes: list[Any], expected: torch.Tensor) -> None:
    results: list[Any] = []
    threads = [threading.Thread(target=lambda pipe=pipe: results.append(draw(pipe))) for pipe in pipes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == len(pipes)
    assert all(torch.equal(one, expected) for one in results)


@pytest.mark.parametrize("rule", NAMES)
def test_two_threads_call_one_module(folder: Path, rule: str) -> None:
    module, attachment = loaded(folder, RULES[rule])
    results: list[torch.Tensor] = []
    threads = [threading.Thread(target=lambda: results.extend(run(module) for _ in range(3))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 6
    assert all(torch.equal(one, plain("unet", "fp32")) for one in results)
    assert all_at_rest(attachment)


@pytest.mark.parametrize("rule", NAMES)
def test_a_module_called_inside_itself(rule: str) -> None:
    class Again(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = torch.nn.ModuleList(torch.nn.Sequential(torch.nn.Linear(4, 4)) for _ in range(3))

        def forward(self, x: torch.Tensor, depth: int = 2) -> torch.Tensor:
            for block in self.blocks:
                x = block(x)
                if depth:
                    x = self(x, depth - 1)
            return x

    module, x = Again(), torch.randn(2, 4)
    with torch.no_grad():
        expected = module(x)
        attachment = put(module, RULES[rule])
        for _ in range(2):
            assert torch.equal(module(x), expected)
    assert all_at_rest(attachment)
    assert attachment.stream.ledger.peak <= attachment.bound


def test_a_pipeline_called_from_its_own_callback(tmp_path: Path) -> None:
    pipe = pipeline(tmp_path)
    pipe.set_progress_bar_config(disable=True)
    expected = draw(pipe)
    pipe.enable_model_cpu_offload(device="cpu")
    refused: list[str] = []

    def again(*_: Any) -> None:
        try:
            draw(pipe)
        except RuntimeError as error:
            refused.append(str(error))

    assert torch.equal(draw(pipe, callback_on_step_end=again), expected)
    assert len(refused) == 2
    assert "second pipeline" in refused[0]


@pytest.mark.parametrize("make", [pipeline, tiny_video.pipeline])
def test_two_pipelines_share_a_scheduler(tmp_path: Path, make: Callable[..., Any]) -> None:
    """One after the other is fine; from a callback or another thread it would change the first one's state."""
    one, other = (make(tmp_path / name) for name in ("one", "other"))
    other.scheduler = one.scheduler
    expected = made(one)
    assert torch.equal(made(other), expected)
    refused: list[str] = []

    def call() -> None:
        with pytest.raises(RuntimeError, match="scheduler is in use already") as caught:
            made(other)
        refused.append(str(caught.value))

    def again(*_: Any) -> None:
        call()
        thread = threading.Thread(target=call)
        thread.start()
        thread.join()

    assert torch.equal(made(one, callback_on_step_end=again), expected)
    assert len(refused) == 4
    assert f"{type(one.scheduler).__name__}.from_config" in refused[0]
    assert torch.equal(made(other), expected)

    def own(pipe: Any, *_: Any) -> None:
        other.scheduler = type(one.scheduler).from_config(one.scheduler.config)
        assert torch.equal(made(other), expected)

    assert torch.equal(made(one, callback_on_step_end=own), expected)


def test_a_scheduler_is_free_after_a_call_that_raises(tmp_path: Path) -> None:
    one, other = pipeline(tmp_path / "one"), pipeline(tmp_path / "other")
    expected, other.scheduler = made(other), one.scheduler

    def raises(pipe: Any, *_: Any) -> None:
        pipe.scheduler = tiny.scheduler()  # the one that the call began with is freed all the same
        raise StopError

    with pytest.raises(StopError):
        made(one, callback_on_step_end=raises)
    assert torch.equal(made(other), expected)


def made(pipe: Any, **options: Any) -> torch.Tensor:
    """Latents of a short run."""
    generator = torch.Generator().manual_seed(0)
    options = {"num_inference_steps": 2, "generator": generator, "output_type": "latent", **options}
    return pipe("a red boat", return_dict=False, **options)[0]


def test_plans_are_not_changed_while_a_module_runs(folder: Path) -> None:
    module, _ = loaded(folder, RULES["leaves ahead"])
    told: list[str] = []

    def change(*_: Any) -> None:
        for action in (
            lambda: detach(module),
            lambda: put(module, RULES["model"]),
            lambda: module.to(torch.float16),
            lambda: module.load_state_dict({}),
        ):
            with pytest.raises(RuntimeError, match="being called") as caught:
                action()
            told.append(str(caught.value))

    handle = module.mid_block.register_forward_hook(change)
    assert torch.equal(run(module), plain("unet", "fp32"))
    assert len(told) == 4
    handle.remove()
    assert torch.equal(run(module), plain("unet", "fp32"))


@pytest.mark.parametrize("zero_copy", [True, False])
def test_a_backward_pass_through_dropped_weights_is_an_error(*, zero_copy: bool) -> None:
    torch.manual_seed(0)
    module = torch.nn.Sequential(*(torch.nn.Linear(8, 8) for _ in range(6))).requires_grad_(False)
    x = torch.randn(2, 8, requires_grad=True)
    put(module, RULES["leaves ahead"], zero_copy=zero_copy)
    out = module(x).sum()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(out, x)


def test_writing_to_a_weight_at_rest_is_an_error_that_says_what_to_do() -> None:
    module = Toy()
    put(module, RULES["leaves ahead"])
    with torch.no_grad(), pytest.raises(RuntimeError, match="Undo that first"):
        module.scale.add_(1)


def test_a_part_and_the_whole_and_others(folder: Path) -> None:
    module, attachment = loaded(folder, RULES["blocks ahead"])
    with pytest.warns(UserWarning, match="is undone"):
        put(module.mid_block, RULES["sequential"])
    assert attachment_of(module) is None
    assert torch.equal(run(module), plain("unet", "fp32"))
    put(module, RULES["leaves ahead"])
    assert attachment_of(module.mid_block) is None
    assert torch.equal(run(module), plain("unet", "fp32"))
    attachment = attachment_of(module)
    assert attachment is not None
    with torch.no_grad():
        module.mid_block.resnets[0](torch.zeros(1, 16, 2, 2), torch.zeros(1, 32))
    assert all_at_rest(attachment), "also after a call of a part alone"


@pytest.mark.filterwarnings("ignore:.*jit.trace:DeprecationWarning")
@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.nn.LazyLinear(4),
        lambda: torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(1, 2)),
        lambda: _with_parameter(torch.eye(3).to_sparse()),
    ],
)
def test_what_cannot_be_moved_as_bytes_is_refused_by_name(make: Callable[[], torch.nn.Module]) -> None:
    module = torch.nn.Sequential(torch.nn.Linear(2, 2), make())
    with pytest.raises(ValueError, match=r"1\.|traced"):
        put(module, RULES["leaves ahead"])
    assert not isinstance(module[0].weight, AtRest)


def _with_parameter(tensor: torch.Tensor) -> torch.nn.Module:
    module = torch.nn.Module()
    module.register_parameter("weight", torch.nn.Parameter(tensor, requires_grad=False))
    return module


def test_weights_on_meta_come_from_their_index(folder: Path) -> None:
    from lowtide.weights.index import find_weights

    with torch.device("meta"):
        module = UNet2DConditionModel.from_config({**tiny.UNETS["sd1"], **tiny.FEW_BLOCKS})
    rule = Rule(Level.BLOCK, Tier.DISK)
    with pytest.raises(ValueError, match="is on meta"):
        attach(module, rule, Stream(CPU))
    assert all(parameter.is_meta for parameter in module.parameters())
    attach(module.eval(), rule, Stream(CPU), index=find_weights(folder, "diffusion_pytorch_model"))
    assert torch.equal(run(module), plain("unet", "fp32"))
    detach(module)
    assert torch.equal(run(module), plain("unet", "fp32"))


@pytest.mark.parametrize("name", ["model", "block", "leaf", "sequential"])
def test_loading_under_a_plan_reads_no_weights(
    tmp_path: Path, halves: tuple[Path, torch.Tensor], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lowtide import StableDiffusionPipeline

    folder, expected = halves
    with monkeypatch.context() as patch:
        patch.setattr(files.WeightFile, "read_into", lambda *_: pytest.fail("weights were read"))
        patch.setattr("lowtide.memory.store.bring_in", lambda *_: pytest.fail("weights were read"))
        pipe = StableDiffusionPipeline.from_pretrained(
            folder, torch_dtype=torch.bfloat16, offload=name, offload_device="cpu"
        )
    assert (pipe.dtype, pipe.device) == (torch.bfloat16, CPU)
    assert torch.equal(draw(_quiet(pipe)), expected)
    pipe.save_pretrained(tmp_path / "again")
    again = _quiet(StableDiffusionPipeline.from_pretrained(tmp_path / "again", torch_dtype=torch.bfloat16))
    assert torch.equal(draw(again), expected)
    assert torch.equal(draw(pipe.to("cpu")), expected)
    assert attachment_of(pipe.unet) is None


def _quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe
