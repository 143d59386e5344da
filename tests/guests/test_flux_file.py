"""FLUX.1 in a single file, whose width diffusers' conversion takes for granted: a gigabyte of two blocks, streamed."""

import json
import subprocess
import sys

import pytest
import torch
from tests.document.processes import environment
from tests.guests import guest_parts as parts
from tests.guests import original_names
from tests.guests.families_two_streams import CALL, flux_parts
from tests.guests.family import Family, family, run
from tests.guests.guest_cases import WARNINGS
from tests.guests.single_file_cases import written

diffusers = pytest.importorskip("diffusers")
pytestmark = [
    *WARNINGS,
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="peaks are read in /proc"),
]
CHILD = """
import json, re, sys
import torch
import lowtide
from lowtide.planning.plan import BudgetError
from tests.guests.family import Family, run
file, config, call, made = sys.argv[1:]
options = {"config": config, "dtype": torch.bfloat16, **json.loads(call)}
try:
    lowtide.load(file, ram="10MB", **options)
except BudgetError as refusal:
    ram = refusal.minimum.ram
pipe = lowtide.load(file, ram=ram, **options)
torch.save(run(Family(pipe, json.loads(call), ())), made)
peak = 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
print(json.dumps({"ram": ram, "peak": peak}))
"""


def wide() -> Family:
    """FLUX.1 of one block of each kind, as wide as the published ones."""
    components = flux_parts()
    with torch.device("meta"):
        network = diffusers.FluxTransformer2DModel(
            in_channels=16, num_layers=1, num_single_layers=1, joint_attention_dim=parts.WIDTH,
            pooled_projection_dim=parts.WIDTH, guidance_embeds=True, axes_dims_rope=(16, 56, 56),
        )  # fmt: skip
    network = network.to(torch.bfloat16).to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    for weight in network.parameters():
        weight.data.uniform_(-0.02, 0.02, generator=generator)
    components["transformer"] = network
    return family(diffusers.FluxPipeline(**components), {**CALL, "max_sequence_length": 24})


def test_a_file_larger_than_its_budget(tmp_path):
    made = wide()
    pipe = made.pipeline
    state = original_names.named(original_names.flux_transformer(pipe.transformer), "model.diffusion_model.")
    state |= original_names.clip(pipe.text_encoder, "text_encoders.clip_l.transformer.")
    state |= original_names.named(pipe.text_encoder_2.state_dict(), "text_encoders.t5xxl.transformer.")
    state |= original_names.autoencoder(pipe.vae, "vae.")
    case = written(made, state, tmp_path)
    del state
    expected = run(case.by_diffusers(torch_dtype=torch.bfloat16))
    arguments = [str(case.file), str(case.config), json.dumps(made.call), str(tmp_path / "made.pt")]
    child = subprocess.run(
        [sys.executable, "-c", CHILD, *arguments], capture_output=True, text=True, env=environment(), check=False
    )
    assert child.returncode == 0, child.stderr[-3000:]
    took = json.loads(child.stdout.splitlines()[-1])
    assert torch.equal(torch.load(tmp_path / "made.pt"), expected)
    assert took["peak"] <= took["ram"] < case.file.stat().st_size
