"""`lowtide generate` with a stand-in pipeline: what is asked of it, what is written, and how errors are told."""

import os
import stat
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from lowtide.cli import generate as command
from lowtide.cli import request as requests
from lowtide.cli.app import app
from lowtide.cli.file_options import NOTHING
from lowtide.media.png import PngWriter
from lowtide.pipelines import own_dtype
from lowtide.stages import Stages

PROMPT = "a red sailboat at sunset"
NO_OFFLOAD, NO_CASTING = requests.Offload.NONE, requests.Casting.NONE


class FakePipeline:
    """Draws a picture of one grey that depends on the generator alone."""

    def __init__(self):
        self.stages = Stages()
        self.scheduler = SimpleNamespace(config={})
        self.calls = []
        self.disabled = None
        self.flagged = None
        self.fail_with = None
        self.tiling = None

    def set_progress_bar_config(self, *, disable):
        self.disabled = disable

    def __call__(self, **arguments):
        self.calls.append(arguments)
        with self.stages.stage("denoise", steps=arguments["num_inference_steps"]) as stage:
            if self.fail_with is not None and len(self.calls) > 1:
                raise self.fail_with
            for _ in range(arguments["num_inference_steps"]):
                stage.advance()
        grey = int(arguments["generator"][0].initial_seed() % 256)
        width, height = arguments["width"] or 64, arguments["height"] or 64
        assert arguments["output_type"] == "file"
        with PngWriter(arguments["output_path"], width, height) as png:
            png.write(np.full((height, width, 3), grey, dtype=np.uint8))
        return SimpleNamespace(images=[arguments["output_path"].path], nsfw_content_detected=self.flagged)

    def image_size(self, height, width):
        return 64, 64

    def enable_vae_tiling(self, mode="blended"):
        self.tiling = mode


@pytest.fixture
def pipe(monkeypatch, tmp_path):
    """The stand-in, loaded whatever the model; the test runs in an empty folder."""
    fake = FakePipeline()
    monkeypatch.setattr(command, "load_pipeline", lambda request, device, dtype: fake)
    monkeypatch.setattr(command, "check_kind", lambda model, **_: None)
    monkeypatch.setattr(own_dtype, "_class_name", lambda source: "CogVideoXPipeline")
    monkeypatch.setattr(requests, "shipped_model", lambda: tmp_path)
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return fake


def lowtide(*arguments):
    return CliRunner().invoke(app, ["generate", *arguments])


def test_a_prompt_alone_makes_one_picture_here_and_tells_what_it_took(pipe, tmp_path):
    result = lowtide(PROMPT, "--seed", "7")
    assert result.exit_code == 0, result.output
    assert result.stdout == "a-red-sailboat-at-sunset-7.png\n"
    assert "seed 7" in result.stderr
    for word in ("load", "denoise", "seconds", "peak memory", "25/25"):
        assert word in result.stderr
    assert [path.name for path in (tmp_path / "here").iterdir()] == ["a-red-sailboat-at-sunset-7.png"]
    assert pipe.disabled is True
    assert pipe.stages.observers == []


def test_all_settings_reach_the_pipeline_and_the_metadata(pipe):
    options = "--steps 3 --size 96x64 --seed 5 --negative fog --guidance 4.5 --out sub/x.png --dtype bfloat16"
    result = lowtide(PROMPT, *options.split())
    assert result.exit_code == 0, result.output
    (call,) = pipe.calls
    assert call["prompt"] == [PROMPT]
    assert call["negative_prompt"] == ["fog"]
    assert (call["width"], call["height"]) == (96, 64)
    assert (call["num_inference_steps"], call["guidance_scale"]) == (3, 4.5)
    with Image.open("sub/x.png") as picture:
        assert picture.size == (96, 64)
        text = picture.text
    assert text["prompt"] == PROMPT
    assert text["negative_prompt"] == "fog"
    assert (text["seed"], text["steps"], text["guidance_scale"]) == ("5", "3", "4.5")
    assert (text["size"], text["dtype"], text["scheduler"]) == ("96x64", "bfloat16", "SimpleNamespace")
    assert text["Software"].startswith("lowtide ")
    assert "/" not in text["model"]


def test_prompts_of_any_script_survive_in_the_metadata(pipe):
    prompt = "деревянная лодка ⛵ 静かな海"
    assert lowtide(prompt, "--out", "x.png").exit_code == 0
    with Image.open("x.png") as picture:
        assert picture.text["prompt"] == prompt


def test_each_picture_of_several_can_be_made_again_alone(pipe):
    assert lowtide(PROMPT, "--seed", "40", "--count", "3", "--out", "many").exit_code == 0
    assert lowtide(PROMPT, "--seed", "41", "--out", "one.png").exit_code == 0
    with Image.open("many/a-red-sailboat-at-sunset-41.png") as first, Image.open("one.png") as again:
        assert first.tobytes() == again.tobytes()
        assert first.text == again.text
    with Image.open("many/a-red-sailboat-at-sunset-42.png") as other:
        assert other.text["seed"] == "42"
        assert other.getpixel((0, 0)) == (42, 42, 42)


def test_a_named_file_is_replaced_and_several_are_numbered(pipe):
    for seed in ("1", "2"):
        assert lowtide(PROMPT, "--seed", seed, "--out", "x.png").exit_code == 0
    with Image.open("x.png") as picture:
        assert picture.text["seed"] == "2"
    assert lowtide(PROMPT, "--count", "2", "--out", "x.png").stdout == "x-1.png\nx-2.png\n"


def test_a_name_that_we_choose_is_never_one_that_is_taken(pipe):
    names = [lowtide(PROMPT, "--seed", "7").stdout.strip() for _ in range(3)]
    assert names == [f"a-red-sailboat-at-sunset-7{end}.png" for end in ("", "-2", "-3")]


def test_without_a_seed_each_run_takes_another_and_names_it(pipe):
    seeds = set()
    for _ in range(2):
        result = lowtide(PROMPT, "--out", "x.png")
        with Image.open("x.png") as picture:
            seeds.add(picture.text["seed"])
            assert f"seed {picture.text['seed']}" in result.stderr
    assert len(seeds) == 2


def test_pictures_have_the_rights_of_any_new_file(pipe):
    lowtide(PROMPT, "--out", "x.png")
    with open("other", "w"):
        pass
    assert stat.S_IMODE(os.stat("x.png").st_mode) == stat.S_IMODE(os.stat("other").st_mode)


def test_a_blacked_out_picture_is_told(pipe):
    pipe.flagged = [True]
    assert "safety checker" in lowtide(PROMPT, "--out", "x.png").stderr


@pytest.mark.parametrize(
    ("options", "tiling"),
    [
        ("", None),
        ("--size 512", None),
        ("--size 520x512", "exact"),
        ("--size 2048 --decode whole", None),
        ("--decode exact", "exact"),
        ("--size 1024 --decode blended", "blended"),
    ],
)
def test_large_pictures_are_decoded_row_by_row_unless_asked_otherwise(pipe, options, tiling):
    assert lowtide(PROMPT, "--out", "x.png", *options.split()).exit_code == 0
    assert pipe.tiling == tiling


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["", "--seed", "1"], "prompt is empty"),
        (["  "], "prompt is empty"),
        ([PROMPT, "--size", "130x128"], "nearest is 128x128"),
        ([PROMPT, "--size", "-8"], "WIDTHxHEIGHT"),
        ([PROMPT, "--size", "8x8x8"], "WIDTHxHEIGHT"),
        ([PROMPT, "--size", "0"], "from 8 to 16384"),
        ([PROMPT, "--size", "99999999"], "from 8 to 16384"),
        ([PROMPT, "--steps", "0"], "--steps=0 is not possible: it must be a whole number, at least 1"),
        ([PROMPT, "--steps", "many"], "--steps"),
        ([PROMPT, "--count", "0"], "at least one picture"),
        ([PROMPT, "--seed", "-1"], "from 0 to"),
        ([PROMPT, "--seed", str(2**64)], "from 0 to"),
        ([PROMPT, "--seed", str(2**64 - 1), "--count", "2"], "from 0 to"),
        ([PROMPT, "--guidance", "nan"], "7.5 is usual"),
        ([PROMPT, "--guidance", "-1"], "7.5 is usual"),
        ([PROMPT, "--dtype", "float8"], "bfloat16"),
        ([PROMPT, "--scheduler", "lms"], "unipc"),
        ([PROMPT, "--decode", "tiles"], "blended"),
        ([PROMPT, "--device", "tpu"], "auto, cpu, cuda"),
        ([PROMPT, "--device", "cuda:99"], "doctor"),
        ([PROMPT, "--model", "./nope"], "no such folder"),
        ([PROMPT, "--model", "a/b/c"], "no such folder"),
        ([PROMPT, "--model", ""], "--model is empty"),
        ([PROMPT, "--out", "x.jpg"], ".png"),
        ([], "PROMPT"),
    ],
)
def test_bad_input_ends_with_2_and_says_what_is_possible(pipe, arguments, told):
    result = lowtide(*arguments)
    assert result.exit_code == 2
    assert told in " ".join(result.stderr.replace("│", " ").split())
    assert "Traceback" not in result.stderr
    assert pipe.calls == []


def test_cuda_where_there_is_none(pipe, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    result = lowtide(PROMPT, "--device", "cuda")
    assert result.exit_code == 2
    assert "no CUDA device" in result.stderr


def test_an_output_place_that_cannot_be_written_is_told_before_any_work(pipe):
    with open("file", "w"):
        pass
    result = lowtide(PROMPT, "--out", "file/x.png")
    assert result.exit_code == 2
    assert "Cannot write in file" in result.stderr
    assert pipe.calls == []


def test_a_model_that_is_a_file_or_a_prompt_that_is_no_text(pipe):
    for name, said in (("model.bin", "this is a file"), ("model.safetensors", "at least 8 bytes")):
        with open(name, "w"):
            pass
        assert said in lowtide(PROMPT, "--model", name).stderr
    assert "not valid text" in lowtide("caf\udce9").stderr


def test_ctrl_c_keeps_what_is_done_and_leaves_nothing_half(pipe):
    pipe.fail_with = KeyboardInterrupt()
    result = lowtide(PROMPT, "--count", "3", "--seed", "1", "--out", "pictures")
    assert result.exit_code == 130
    assert "Stopped" in result.stderr
    assert os.listdir("pictures") == ["a-red-sailboat-at-sunset-1.png"]


def test_a_failed_write_leaves_the_old_picture_and_no_temporary_file(pipe, monkeypatch):
    assert lowtide(PROMPT, "--seed", "1", "--out", "x.png").exit_code == 0

    def half_a_save(self, content, **_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(PngWriter, "_data", half_a_save)
    result = lowtide(PROMPT, "--seed", "2", "--out", "x.png")
    assert result.exit_code == 1
    assert "No space left" in result.stderr
    assert os.listdir() == ["x.png"]
    with Image.open("x.png") as picture:
        assert picture.text["seed"] == "1"


@pytest.mark.parametrize(
    ("error", "code", "told"),
    [
        (OSError("the model cannot be had offline"), 1, "cannot be had offline"),
        (ValueError("no such variant"), 2, "no such variant"),
        (MemoryError(), 1, "smaller --size"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), 1, "smaller --size"),
        (KeyError("secret"), 1, "LOWTIDE_DEBUG=1"),
    ],
)
def test_errors_of_the_library_are_told_without_a_traceback(pipe, monkeypatch, error, code, told):
    def fail(*_):
        raise error

    monkeypatch.setattr(command, "load_pipeline", fail)
    result = lowtide(PROMPT, "--out", "x.png")
    assert result.exit_code == code
    assert told in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("how", ["option", "variable"])
def test_debugging_lets_the_error_through(pipe, monkeypatch, how):
    monkeypatch.setattr(command, "load_pipeline", lambda *_: 1 / 0)
    if how == "variable":
        monkeypatch.setenv("LOWTIDE_DEBUG", "1")
    result = lowtide(PROMPT, "--out", "x.png", *(["--debug"] if how == "option" else []))
    assert isinstance(result.exception, ZeroDivisionError)


def test_float16_on_a_cpu_is_warned_of(pipe):
    assert (
        "100 times as long as in float32"
        in lowtide(PROMPT, "--out", "x.png", "--dtype", "float16", "--device", "cpu").stderr
    )


PLAIN = {"model": "m", "variant": None, "video": None, "beside": NOTHING}


@pytest.fixture
def any_kind(monkeypatch):
    """No model is looked at before it is loaded."""
    monkeypatch.setattr(command, "check_kind", lambda model, **_: None)


@pytest.mark.usefixtures("any_kind")
def test_every_scheduler_name_leads_to_its_class(monkeypatch):
    import lowtide as library

    for name in requests.SchedulerName:
        fake = FakePipeline()
        fake.to = lambda device, fake=fake: fake
        loader = SimpleNamespace(from_pretrained=lambda *_, fake=fake, **__: fake)
        monkeypatch.setitem(vars(library), "StableDiffusionPipeline", loader)
        request = SimpleNamespace(**PLAIN, scheduler=name, offload=NO_OFFLOAD, casting=NO_CASTING, budget=None)
        command.load_pipeline(request, "cpu", "float32")
        assert name.value.replace("-", "") in type(fake.scheduler).__name__.lower()


@pytest.mark.usefixtures("any_kind")
def test_an_offload_reaches_the_loader_and_the_pipeline_stays_where_it_is(monkeypatch):
    import lowtide as library

    for name in requests.Offload:
        given = {}
        fake = FakePipeline()
        fake.to = lambda device, fake=fake, given=given: given.update(moved=device) or fake
        loader = SimpleNamespace(
            from_pretrained=lambda *_, fake=fake, given=given, **kwargs: given.update(kwargs) or fake
        )
        monkeypatch.setitem(vars(library), "StableDiffusionPipeline", loader)
        request = SimpleNamespace(**PLAIN, scheduler=None, offload=name, casting=NO_CASTING, budget=None)
        command.load_pipeline(request, "cpu", "float32")
        assert given["offload"] == (None if name == "none" else name.value)
        assert given["offload_device"] == "cpu"
        assert ("moved" in given) == (name == "none")


@pytest.mark.usefixtures("any_kind")
def test_a_casting_reaches_the_loader(monkeypatch):
    import lowtide as library

    for name, expected in (("none", None), ("fp8", "fp8"), ("int8", "int8"), ("int4", "int4")):
        given = {}
        fake = FakePipeline()
        fake.to = lambda device, fake=fake: fake
        loader = SimpleNamespace(from_pretrained=lambda *_, given=given, fake=fake, **more: given.update(more) or fake)
        monkeypatch.setitem(vars(library), "StableDiffusionPipeline", loader)
        casting = requests.Casting(name)
        request = SimpleNamespace(**PLAIN, scheduler=None, offload=NO_OFFLOAD, casting=casting, budget=None)
        command.load_pipeline(request, "cpu", "float32")
        assert given["casting"] == expected


def test_the_casting_is_in_the_metadata(pipe):
    assert lowtide(PROMPT, "--out", "x.png", "--casting", "int8").exit_code == 0
    with Image.open("x.png") as picture:
        assert picture.text["casting"] == "int8"
