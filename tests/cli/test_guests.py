"""`lowtide plan` and `lowtide generate` with tiny pipelines of diffusers: results, names, and errors in one line."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from tests.document.processes import environment
from tests.fitting.fits import RATES, traced_once  # noqa: F401
from tests.guests.families import FAMILIES
from tests.guests.families_unets import LARGE, unet
from tests.guests.family import picture
from typer.testing import CliRunner

from lowtide.cli.app import app
from lowtide.cli.guest_options import images_and_settings
from lowtide.fitting import prepare

av = pytest.importorskip("av")
pytest.importorskip("diffusers")
pytestmark = [
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="budgets are held by what /proc tells"),
    pytest.mark.filterwarnings("ignore:`FluxPosEmbed` is deprecated:FutureWarning"),
    pytest.mark.usefixtures("traced_once"),
]
PROMPT = "a red boat at night"
SIZE = ("--size", "48x64", "--steps", "2")
CLASSES = {"SDXL": "StableDiffusionXLPipeline", "Flux": "FluxPipeline", "Wan": "WanPipeline"}
NO_DIFFUSERS = """
import sys
class NotInstalled:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "diffusers":
            raise ModuleNotFoundError("No module named 'diffusers'")
sys.meta_path.insert(0, NotInstalled())
from lowtide.cli.app import main
sys.argv[1:] = {arguments!r}
main()
"""


FEW_BLOCKS = {
    "block_out_channels": [8, 16],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
    "transformer_layers_per_block": [1, 2],
}


def pipeline_of(name):
    """A tiny pipeline of a family; SDXL's has fewer modules than elsewhere, since commands load it over and over."""
    pipe = FAMILIES[name]().pipeline
    if name == "SDXL":
        pipe.unet = unet(**{**LARGE, **FEW_BLOCKS})
    return pipe


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders of models, by family; those called "no weights" hold configurations alone."""
    folder = tmp_path_factory.mktemp("guests")
    for name in CLASSES:
        pipeline_of(name).save_pretrained(folder / name)
    of_class(folder / "SDXL", folder / "img2img", "StableDiffusionXLImg2ImgPipeline")
    shutil.copytree(folder / "SDXL", folder / "no weights", ignore=shutil.ignore_patterns("*.safetensors"))
    return folder


@pytest.fixture(autouse=True)
def place(monkeypatch, tmp_path):
    """An empty folder, and a CPU whose rates need not be measured."""
    of_a_gpu = prepare._rates
    monkeypatch.setattr(
        prepare, "_rates", lambda meta, loaded: RATES if meta.device.type == "cpu" else of_a_gpu(meta, loaded)
    )
    monkeypatch.chdir(tmp_path)


def of_class(model, copy, name):
    """A copy of a model whose index names another class."""
    shutil.copytree(model, copy)
    rewrite(copy, _class_name=name)
    return copy


def rewrite(model, **entries):
    index = model / "model_index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), **entries}))


def lowtide(*arguments):
    return CliRunner(env={"COLUMNS": "150"}).invoke(app, [*map(str, arguments)])


def generate(model, *options, prompt=PROMPT):
    return lowtide("generate", prompt, "--model", model, "--device", "cpu", *options)


def pixels(path):
    with Image.open(path) as opened:
        return np.asarray(opened.convert("RGB")).astype(int)


def one_line(result):
    """What was said of wrong input."""
    assert result.exit_code == 2, result.output
    told = [line for line in result.stderr.splitlines() if not line.startswith(("lowtide ", "load "))]
    assert len(told) == 1
    assert "Traceback" not in told[0]
    return told[0]


def test_a_picture_is_that_of_the_pipeline_itself(models):
    options = (*SIZE, "--seed", 3, "--guidance", 4, "--negative", "fog", "--set", "guidance_rescale=0.5")
    result = generate(models / "SDXL", *options, "--out", "x.png", "--ram", "8GB")
    assert result.exit_code == 0, result.output
    assert result.stdout == "x.png\n"
    order = [
        "(StableDiffusionXLPipeline), 2 steps, seed 3",
        "Plan: ",
        "unet 1/2 ",
        "unet 2/2 ",
        "of bound",
        "within the",
    ]
    places = [result.stderr.index(said) for said in order]
    assert places == sorted(places)
    own = pipeline_of("SDXL")(
        PROMPT, negative_prompt="fog", height=64, width=48, num_inference_steps=2, guidance_scale=4.0,
        guidance_rescale=0.5, generator=torch.Generator().manual_seed(3),
    )  # fmt: skip
    assert np.abs(pixels("x.png") - np.asarray(own.images[0])).max() <= 1  # mapped weights round otherwise
    with Image.open("x.png") as made:
        assert made.text["pipeline"] == "StableDiffusionXLPipeline"
        assert json.loads(made.text["settings"]) == {"guidance_rescale": 0.5}
        assert (made.text["seed"], made.text["steps"], made.text["guidance_scale"]) == ("3", "2", "4.0")
        assert (made.text["prompt"], made.text["negative_prompt"], made.text["size"]) == (PROMPT, "fog", "48x64")
    options = [each if each != "fog" else "sun" for each in options]
    assert generate(models / "SDXL", *options, "--out", "y.png").exit_code == 0
    assert np.abs(pixels("x.png") - pixels("y.png")).max() > 8  # the control


def test_each_picture_of_several_has_its_own_seed(models):
    options = (*SIZE, "--set", "max_sequence_length=24")
    result = generate(models / "Flux", *options, "--seed", 5, "--count", 2, "--out", "many")
    assert result.exit_code == 0, result.output
    assert result.stdout.split() == ["many/a-red-boat-at-night-5.png", "many/a-red-boat-at-night-6.png"]
    assert generate(models / "Flux", *options, "--seed", 6, "--out", "one.png").exit_code == 0
    first, second, alone = (pixels(path) for path in (*result.stdout.split(), "one.png"))
    assert np.abs(second - alone).max() <= 2  # a batch of two rounds otherwise
    assert np.abs(first - alone).max() > 8


def test_a_clip_and_its_sheet(models):
    options = (*SIZE, "--frames", 5, "--seed", 1, "--set", "max_sequence_length=24", "--sheet", "--out", "x.mp4")
    result = generate(models / "Wan", *options)
    assert result.exit_code == 0, result.output
    assert result.stdout.split() == ["x.mp4", "x-sheet.png"]
    assert "transformer 4/4 " in result.stderr  # with guidance, each step is two calls
    with av.open("x.mp4") as container:
        stream = container.streams.video[0]
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
    assert (len(frames), frames[0].shape, stream.average_rate) == (5, (64, 48, 3), 16)


def test_a_picture_to_begin_with(models):
    for seed, name in enumerate("ab"):
        picture(64, 48, seed).save(f"{name}.png")
        options = (
            "--steps",
            3,
            "--seed",
            1,
            "--image",
            f"{name}.png",
            "--set",
            "strength=0.5",
            "--out",
            f"of-{name}.png",
        )
        result = generate(models / "img2img", *options)
        assert result.exit_code == 0, result.output
    assert np.abs(pixels("of-a.png") - pixels("of-b.png")).max() > 8
    with Image.open("of-a.png") as made:
        assert made.text["images"] == "a.png"
    told = one_line(generate(models / "img2img", "--out", "x.png"))
    assert told.startswith("Error: StableDiffusionXLImg2ImgPipeline: ")
    assert told.endswith("It takes --image, which was not given.")


def test_several_pictures_for_one_argument_are_a_list():
    for seed, name in enumerate("abc"):
        picture(16, 16, seed).save(f"{name}.png")
    given, named, _ = images_and_settings(["a.png", "frames=b.png", "mask=a.png", "frames=c.png"], None)
    assert np.array_equal(given["--image"], picture(16, 16, 0))
    assert [np.array_equal(made, picture(16, 16, seed)) for seed, made in enumerate(named["frames"], 1)] == [True] * 2
    assert np.array_equal(named["mask"], picture(16, 16, 0))


def test_a_plan_needs_no_weights(models):
    options = ("--device", "cpu", "--size", "64", "--steps", 4, "--batch", 2, "--dtype", "float32", "--json")
    with_weights, without = (lowtide("plan", models / name, *options) for name in ("SDXL", "no weights"))
    assert without.exit_code == with_weights.exit_code == 0, without.output
    plan, other = (json.loads(result.stdout)["chosen"] for result in (without, with_weights))
    assert [stage["name"] for stage in plan["stages"]] == ["text_encoder", "text_encoder_2", "unet", "vae.decode"]
    assert plan["made_for"]["num_images_per_prompt"] == 2
    assert plan["peak"] == pytest.approx(other["peak"], rel=0.1)  # some weights lie in files where they are copied


def test_a_gpu_that_is_not_there(models):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    options = ("--device", "cuda", "--size", 64, "--dtype", "bfloat16", "--vram", "4GB", "--plot", "x.png")
    result = lowtide("plan", models / "no weights", *options)
    assert result.exit_code == 0, result.output
    assert "no weights: 64x64, bfloat16, on cuda" in result.stdout
    assert "of 4.00 GB of GPU memory" in result.stdout
    assert "assumed rates" in result.stdout
    assert "Written: x.png" in result.stderr


def test_the_table_of_plans_and_a_refusal(models):
    result = lowtide("plan", models / "no weights", "--device", "cpu", "--size", "64x48", "--steps", 4, "--ram", "1GB")
    assert result.exit_code == 0, result.output
    assert "no weights: 64x48, 4 steps, float32, on the CPU" in result.stdout
    for said in ("Chosen: ", "→", "Minimum", "One gigabyte more", "Why"):
        assert said in result.stdout
    assert "are not here, so they are planned in float32" in result.stderr
    result = lowtide("plan", models / "no weights", "--device", "cpu", "--size", "64x48", "--ram", "100kB")
    assert result.exit_code == 2
    assert "it needs at least " in result.stderr
    assert "Try --ram " in result.stderr


WRONG = [
    ("--frames 9", "StableDiffusionXLPipeline takes no --frames. It takes --negative, --size, --steps, --guidance"),
    ("--set guidence=3", "guidence: a call of StableDiffusionXLPipeline takes no such argument. It takes prompt"),
    ("--set guidance_scale=3 --guidance 4", "guidance_scale is given by --guidance and by its own name"),
    ("--set 3", "--set 3: write NAME=VALUE"),
    ("--set output_type=latent", "only pil, np, pt can be written to files"),
    ("--image nothere.png", "--image nothere.png: No such file"),
    ("--lora x.bin", "--lora x.bin: give a .safetensors file"),
    ("--lora x.safetensors:0.8", "there is no file x.safetensors"),
    (
        "--offload block",
        "--offload block is for models that Lowtide has a pipeline of its own for. With others a budget",
    ),
    ("--casting int8", "--casting int8 is for models"),
    ("--decode exact", "--decode exact is for models"),
    ("--scheduler ddim", "others use the one that comes with them"),
    ("--video", "makes pictures: leave out --video"),
    ("--fps 9", "--fps is for videos"),
    ("--out x.mp4", "pictures are written as PNG"),
    ("--ram lots", "--ram lots: Give bytes or a size"),
    ("--size 8x8x8", "WIDTHxHEIGHT"),
    ("--steps 0", "--steps=0 is not possible"),
]


@pytest.mark.parametrize(("options", "told"), WRONG)
def test_wrong_options_are_told_before_anything_is_loaded(models, options, told):
    assert told in one_line(generate(models / "no weights", *options.split()))


def test_wrong_options_are_told_without_torch(models):
    code = (
        "import sys; from typer.testing import CliRunner; from lowtide.cli.app import app; "
        f"options = ['--model', {str(models / 'no weights')!r}, '--frames', '9']; "
        "result = CliRunner().invoke(app, ['generate', 'x', *options]); "
        "assert 'takes no --frames' in result.stderr, result.output; "
        "print('torch' in sys.modules, 'diffusers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, env=environment())
    assert done.stdout.split() == ["False", "False"]


@pytest.mark.parametrize("command", ["plan", "generate"])
def test_what_the_pipeline_itself_refuses(models, command):
    chosen = {"plan": ["plan"], "generate": ["generate", "x", "--model"]}[command]
    result = lowtide(*chosen, models / "SDXL", "--device", "cpu", "--size", "65", "--set", 'prompt_2="x"')
    assert one_line(result) == (
        "Error: StableDiffusionXLPipeline: `height` and `width` have to be divisible by 8 but are 65 and 65."
    )


def test_a_variant_that_no_component_has(models):
    assert "has no weights of variant 'fp16'" in one_line(generate(models / "SDXL", *SIZE, "--variant", "fp16"))


@pytest.mark.parametrize("command", ["plan", "generate"])
def test_classes_that_are_nowhere(models, tmp_path, command):
    chosen = {"plan": ["plan"], "generate": ["generate", "x", "--model"]}[command]
    copy = of_class(models / "no weights", tmp_path / "copy", "MadeUpPipeline")
    assert "names the pipeline 'MadeUpPipeline', which diffusers" in one_line(lowtide(*chosen, copy))
    rewrite(copy, _class_name=["pipeline", "MadeUpPipeline"])
    assert "_class_name=['pipeline', 'MadeUpPipeline'] is not possible" in one_line(lowtide(*chosen, copy))
    rewrite(copy, _class_name="StableDiffusionXLPipeline", text_encoder=["my_code", "MyEncoder"])
    assert "entry 'text_encoder' is a 'MyEncoder' of 'my_code'" in one_line(lowtide(*chosen, copy))


@pytest.mark.parametrize("command", ["plan", "generate"])
def test_without_diffusers(warm, models, tmp_path, command):
    chosen = {"plan": ["plan"], "generate": ["generate", "x", "--model"]}[command]
    result = warm.run(NO_DIFFUSERS.format(arguments=[*chosen, str(models / "no weights")]), tmp_path, 60)
    assert result.status == 2
    assert result.output == (
        "Error: A StableDiffusionXLPipeline is served through diffusers, which is not installed: "
        "pip install 'lowtide[guests]'\n"
    )


def test_options_for_guests_with_a_model_of_ours():
    told = one_line(lowtide("generate", "x", "--set", "strength=0.5"))
    assert "--set strength=0.5: seascapes is loaded by a pipeline of Lowtide's own" in told
    assert "--image x.png: seascapes" in one_line(lowtide("plan", "--image", "x.png"))


def test_a_lora_needs_peft(models, monkeypatch, tmp_path):
    (tmp_path / "x.safetensors").touch()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "peft" else True)
    told = one_line(generate(models / "no weights", "--lora", "x.safetensors:0.8"))
    assert told == "Error: --lora needs peft, which is not installed: pip install peft"


def test_a_lora_changes_the_picture(models):
    pytest.importorskip("peft")
    from safetensors.torch import save_file

    network = pipeline_of("SDXL").unet
    weights = {}
    for name, layer in network.named_modules():
        if name.endswith(("to_q", "to_v")):
            weights[f"unet.{name}.lora_A.weight"] = torch.randn(4, layer.in_features)
            weights[f"unet.{name}.lora_B.weight"] = torch.randn(layer.out_features, 4)
    save_file(weights, "lora.safetensors")
    for strength in (0, 1):
        options = ("--seed", 1, "--lora", f"lora.safetensors:{strength}", "--out", f"{strength}.png")
        result = generate(models / "SDXL", "--size", "48x64", "--steps", 1, *options)
        assert result.exit_code == 0, result.output
    assert np.abs(pixels("0.png") - pixels("1.png")).max() > 8
    with Image.open("1.png") as made:
        assert made.text["loras"] == "lora.safetensors:1"
    told = one_line(generate(models / "Flux", *SIZE, "--lora", "lora.safetensors"))
    assert "lora.safetensors has no weights for the networks of a FluxPipeline" in told
