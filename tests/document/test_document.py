"""Every snippet of the document "Reduce memory usage" runs with the import name, the model id and the device replaced.

By default on tiny weights; `slow` verbatim on them, and on the shipped model and Stable Diffusion 1.5's shapes with the
numbers replaced that `cases` lists; `gpu` with nothing replaced but the import name and the model id.
"""

import functools

import pytest
import torch
from tests.document import evidence
from tests.document.cases import (
    CASES,
    CHANNELS_LAST,
    SD15,
    SD15_LARGE,
    SHIPPED,
    SHIPPED_LARGE,
    SLICING,
    TINY,
    TINY_LARGE,
    VIDEO_CASES,
    Setting,
    for_this_cpu,
    script_of,
    source_of,
)
from tests.document.checkpoints import SHIPPED as SHIPPED_MODEL

from lowtide import UNet2DConditionModel

LIMIT, SLOW_LIMIT = 300, 3600
"""Seconds a script may take; many times what it does, for machines are busy."""
every_case = pytest.mark.parametrize("name", CASES)
of_pictures = pytest.mark.parametrize("name", [name for name in CASES if name not in VIDEO_CASES])


@pytest.fixture
def models(tiny_model, wide_model, video_model):
    """A tiny checkpoint for each case."""
    others = {"channels-last": wide_model, **dict.fromkeys(VIDEO_CASES, video_model)}
    return {name: others.get(name, tiny_model) for name in CASES}


def run_case(name, setting, runner, folder, limit):
    """Run a case's scripts in one folder, and see that they print what they must."""
    for step in CASES[name]:
        output = runner.run(script_of(step, setting), folder, limit).check()
        places = [output.find(line) for line in step.printed(setting.denoiser)]
        assert -1 not in places, output
        assert places == sorted(places), output


@every_case
def test_on_tiny_weights(name, models, warm, tmp_path):
    run_case(name, Setting(models[name], fewer=TINY, large=TINY_LARGE), warm, tmp_path, LIMIT)


@pytest.mark.slow
@every_case
def test_verbatim_on_tiny_weights(name, models, fresh, tmp_path):
    run_case(name, Setting(models[name]), fresh, tmp_path, SLOW_LIMIT)


@pytest.mark.slow
@of_pictures
def test_on_the_shipped_model(name, fresh, tmp_path):
    run_case(name, Setting(SHIPPED_MODEL, fewer=SHIPPED, large=SHIPPED_LARGE), fresh, tmp_path, SLOW_LIMIT)


@pytest.mark.slow
@of_pictures
def test_on_the_shapes_of_stable_diffusion(name, sd15_model, fresh, tmp_path):
    setting = Setting(sd15_model, fewer=for_this_cpu(SD15), pictures=2, large=SD15_LARGE)
    run_case(name, setting, fresh, tmp_path, SLOW_LIMIT)


@pytest.mark.gpu  # alone: the text says "cuda", asks `torch.cuda`, and runs in processes where no stand-in is
@every_case
def test_verbatim_on_a_gpu(name, sd15_model, video_model, fresh, tmp_path):
    model = video_model if name in VIDEO_CASES else sd15_model
    run_case(name, Setting(model, "cuda"), fresh, tmp_path, SLOW_LIMIT)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_a_trace_made_in_bfloat16_keeps_whole_times(tiny_model):
    """The document traces with a time in half precision and then runs with the scheduler's whole numbers."""
    unet = UNet2DConditionModel.from_pretrained(tiny_model, subfolder="unet", torch_dtype=torch.bfloat16)
    unet.to(memory_format=torch.channels_last)
    unet.forward = functools.partial(unet.forward, return_dict=False)
    shapes = ((2, 4, 8, 8), (1,), (2, 77, 768))
    with torch.inference_mode():
        inputs = tuple(torch.ones(shape, dtype=torch.bfloat16) for shape in shapes)
        traced = torch.jit.trace(unet, inputs, check_trace=False)
    evidence.same_as_untraced(traced, str(tiny_model), torch.bfloat16, "cpu")


# ---- negative controls: the runners and the evidence fail where they should


@pytest.mark.parametrize("kind", ["warm", "fresh"])
def test_a_wrong_name_fails_the_runner(kind, request, tiny_model, tmp_path):
    source = source_of(SLICING, Setting(tiny_model))
    wrong = source.replace("import StableDiffusionPipeline", "import StableDiffusionPipelines")
    assert wrong != source
    result = request.getfixturevalue(kind).run(wrong, tmp_path, LIMIT)
    assert result.status == 1
    assert "StableDiffusionPipelines" in result.output
    with pytest.raises(AssertionError, match="exit status 1"):
        result.check()


def test_the_peers_name_is_seen(warm, tmp_path):
    script = (
        "import sys\nsys.modules['diffusers'] = sys\nfrom tests.document import evidence\nevidence.of_this_tree()\n"
    )
    assert "AssertionError" in warm.run(script, tmp_path, LIMIT).output


def test_a_script_that_takes_too_long_is_ended(warm, tmp_path):
    assert warm.run("import time\ntime.sleep(60)\n", tmp_path, 1).status < 0


@pytest.fixture(scope="module")
def seen_right():
    """The cases whose scripts, as they are, were found right in this run."""
    return set()


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("group-offload", "video[1] = video[0]"),
        ("group-offload", "del video[0]"),
        ("group-offload", "import os; os.truncate('output.mp4', 0)"),
        ("group-offload", "pipe.disable_group_offload()"),
        ("fp8-casting", "pipe.transformer.disable_layerwise_casting()"),
    ],
)
def test_wrong_clips_and_plans_are_seen(name, wrong, seen_right, video_model, warm, tmp_path):
    (step,) = CASES[name]
    script = script_of(step, Setting(video_model, fewer=TINY))
    if name not in seen_right:
        assert warm.run(script, tmp_path, LIMIT).status == 0
        seen_right.add(name)
    script = script.replace("from tests.document", f"{wrong}\nfrom tests.document")
    assert "Error" in warm.run(script, tmp_path, LIMIT).output


@pytest.mark.parametrize(
    "wrong",
    ["sample.images = sample.images * 2", "sample.images = [sample.images[0].resize((8, 8))]", "del sample.images[0]"],
    ids=["twice", "small", "none"],
)
def test_wrong_pictures_are_seen(wrong, tiny_model, warm, tmp_path):
    (step,) = CASES["xformers"]
    script = script_of(step, Setting(tiny_model, fewer=TINY)).replace(
        "from tests.document", f"{wrong}\nfrom tests.document"
    )
    result = warm.run(script, tmp_path, LIMIT)
    assert result.status == 1
    assert "AssertionError" in result.output


def test_strides_that_do_not_change_are_seen(wide_model, warm, tmp_path):
    (step,) = CASES["channels-last"]
    assert step.number == CHANNELS_LAST
    script = script_of(step, Setting(wide_model)).replace("torch.channels_last", "torch.contiguous_format")
    result = warm.run(script, tmp_path, LIMIT)
    assert result.status == 1
    assert "(2880, 1, 960, 320)" not in result.output
