"""Writes schedulers.json: trajectories of the peer's schedulers, for machines that do not have the peer.

Run from the repository's root, with diffusers installed: python -m tests.goldens.make_schedulers
"""

from __future__ import annotations

import json
from pathlib import Path

from tests.schedulers.trajectories import AT_SIGMA_MIN, COGVIDEOX_5B, FLOW, SD15, seeded, start, trajectory, with_memory

PATH = Path(__file__).with_name("schedulers.json")
SHAPE = (1, 1, 2, 3)
V = {"prediction_type": "v_prediction", "timestep_spacing": "trailing"}
CONTINUOUS = {**V, "interpolation_type": "log_linear", "timestep_type": "continuous"}
CASES = {
    "ddim": ("DDIMScheduler", {}),
    "ddim v": ("DDIMScheduler", {**V, "rescale_betas_zero_snr": True}),
    "pndm": ("PNDMScheduler", {}),
    "pndm runge-kutta": ("PNDMScheduler", {"skip_prk_steps": False}),
    "unipc": ("UniPCMultistepScheduler", {}),
    "unipc bh1 order 3": ("UniPCMultistepScheduler", {**V, "solver_type": "bh1", "solver_order": 3}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler karras": ("EulerDiscreteScheduler", {"use_karras_sigmas": True, "timestep_spacing": "leading"}),
    "dpm": ("DPMSolverMultistepScheduler", {}),
    "dpm karras order 3": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True, "solver_order": 3}),
    "dpm cosine": ("DPMSolverMultistepScheduler", {**V, "beta_schedule": "squaredcos_cap_v2"}),
    "ddim thresholding": ("DDIMScheduler", {"thresholding": True, "sample_max_value": 2.0}),
    "unipc flow": ("UniPCMultistepScheduler", {**FLOW, "flow_shift": 3.0}),
    "euler log-linear, continuous": ("EulerDiscreteScheduler", CONTINUOUS),
    "dpm flow": ("DPMSolverMultistepScheduler", {**FLOW, "flow_shift": 3.0}),
    "dpm sde": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++", "use_lu_lambdas": True}),
    "dpm of the noise": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver", **AT_SIGMA_MIN}),
    "cogvideox ddim": ("CogVideoXDDIMScheduler", {**COGVIDEOX_5B, "snr_shift_scale": 3.0}),
    "cogvideox dpm": ("CogVideoXDPMScheduler", COGVIDEOX_5B),
    "cogvideox dpm epsilon": ("CogVideoXDPMScheduler", {}),
}


def entries_of(name: str, changes: dict) -> dict:
    """The published entries of Stable Diffusion 1.5 with `changes`; bh1 cannot end at σ = 0 in the peer."""
    final = {"final_sigmas_type": "sigma_min"} if changes.get("solver_type") == "bh1" else {}
    return {**SD15, **changes, **final, "_class_name": name}


def main() -> None:
    import diffusers

    goldens = {"diffusers": diffusers.__version__, "cases": {}}
    for case, (name, changes) in CASES.items():
        entries = entries_of(name, changes)
        scheduler = with_memory(getattr(diffusers, name).from_config(entries))
        samples = trajectory(scheduler, 8, start(1, shape=SHAPE), **seeded(name, entries))
        goldens["cases"][case] = {
            "entries": entries,
            "timesteps": scheduler.timesteps.tolist(),
            "samples": [[float(f"{value:.9g}") for value in sample.flatten().tolist()] for sample in samples],
        }
    lines = [f"{json.dumps(case)}: {json.dumps(golden)}" for case, golden in goldens["cases"].items()]
    cases = "{\n" + ",\n".join(lines) + "\n}"
    PATH.write_text(f'{{"diffusers": "{goldens["diffusers"]}", "cases": {cases}}}\n', encoding="utf-8")


if __name__ == "__main__":
    main()
