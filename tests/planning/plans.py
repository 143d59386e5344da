"""Plans made by hand, of the size of real ones: Stable Diffusion 1.5, on a GPU and on a CPU."""

from __future__ import annotations

from dataclasses import replace

from lowtide.memory.rule import Level, Rule, Tier
from lowtide.planning.plan import Budgets, ComponentPlan, Plan, StagePlan

GB, MB = 10**9, 10**6


def stage(name: str, component: str, **given) -> StagePlan:
    usual = {
        "calls": 1,
        "way": "whole",
        "weights": 0,
        "mapped": 0,
        "activations": 0,
        "workspace": 0,
        "carried": 0,
        "base": 0,
        "slack": 0,
        "host": 0,
        "disk": 0,
        "seconds": 1.0,
        "compute_seconds": 1.0,
        "link_seconds": 0.0,
        "disk_seconds": 0.0,
    }
    return StagePlan(name, component, **{**usual, **given})


def on_cpu() -> Plan:
    """In 1 GB of memory: blocks from disk, the decode row by row."""
    base = {"base": 310 * MB, "slack": 12 * MB}
    blocks = Rule(Level.BLOCK, Tier.DISK)
    stages = (
        stage(
            "encode prompt", "text_encoder", weights=150 * MB, mapped=150 * MB, activations=20 * MB, host=492 * MB,
            seconds=0.4, compute_seconds=0.2, disk_seconds=0.4, **base,
        ),
        stage(
            "denoise", "unet", calls=30, weights=280 * MB, mapped=280 * MB, activations=210 * MB, workspace=60 * MB,
            carried=3 * MB, host=875 * MB, seconds=29.0, compute_seconds=27.0, disk_seconds=21.0, **base,
        ),
        stage(
            "decode", "vae", way="exact", weights=168 * MB, mapped=168 * MB, activations=330 * MB, workspace=90 * MB,
            carried=6 * MB, host=916 * MB, seconds=9.5, compute_seconds=9.3, disk_seconds=0.1, **base,
        ),
    )  # fmt: skip
    return Plan(
        device="cpu",
        dtype="bfloat16",
        components={"text_encoder": ComponentPlan(blocks), "unet": ComponentPlan(blocks), "vae": ComponentPlan(blocks)},
        stages=stages,
        budgets=Budgets(ram=GB),
        why=("unet by blocks: resident it would take 1.72 GB", "decode row by row: whole it would take 2.31 GB"),
        made_for={"width": 512, "height": 512, "steps": 30},
    )


def on_gpu() -> Plan:
    """In 6 GB of a GPU: part of the UNet resident, the decode one by one."""
    base = {"base": 420 * MB, "slack": 120 * MB}
    unet = Rule(Level.BLOCK, Tier.HOST, resident_bytes=900 * MB)
    stages = (
        stage(
            "encode prompt", "text_encoder", weights=250 * MB, activations=40 * MB, host=3 * GB, seconds=0.08,
            compute_seconds=0.02, link_seconds=0.08, **base,
        ),
        stage(
            "denoise", "unet", calls=30, weights=1300 * MB, activations=2600 * MB, workspace=700 * MB, carried=40 * MB,
            host=4 * GB, seconds=41.0, compute_seconds=40.0, link_seconds=12.0, **base,
        ),
        stage(
            "decode", "vae", calls=4, way="sliced", weights=168 * MB, activations=4200 * MB, workspace=900 * MB,
            carried=60 * MB, host=3 * GB, seconds=3.2, compute_seconds=3.1, link_seconds=0.1, **base,
        ),
    )  # fmt: skip
    return Plan(
        device="cuda",
        dtype="float16",
        components={
            "text_encoder": ComponentPlan(Rule(Level.WHOLE, Tier.HOST)),
            "unet": ComponentPlan(unet),
            "vae": ComponentPlan(Rule(Level.WHOLE, Tier.HOST)),
        },
        stages=stages,
        budgets=Budgets(vram=6 * GB, ram=16 * GB),
        why=("decode one by one: four at once would take 19.10 GB",),
        made_for={"width": 1024, "height": 1024, "pictures": 4, "steps": 30},
        assumed=True,
    )


def scaled(plan: Plan, memory: float, seconds: float) -> Plan:
    """The same with so many times the memory and time."""
    sizes = ("weights", "mapped", "activations", "workspace", "carried", "host")
    times = ("seconds", "compute_seconds", "link_seconds", "disk_seconds")
    return replace(
        plan,
        stages=tuple(
            replace(
                one,
                **{name: int(getattr(one, name) * memory) for name in sizes},
                **{name: getattr(one, name) * seconds for name in times},
            )
            for one in plan.stages
        ),
    )


def resident(plan: Plan) -> Plan:
    """Everything on the device and gone through whole: larger, and faster."""
    large = scaled(plan, 2.8, 0.9)
    return replace(
        large,
        components={name: ComponentPlan() for name in plan.components},
        stages=tuple(replace(one, way="whole") for one in large.stages),
        why=(),
    )


def lossy(plan: Plan) -> Plan:
    """The UNet in int8: smaller, and changed."""
    small = scaled(plan, 0.7, 1.1)
    unet = replace(plan.components["unet"], casting="int8")
    return replace(small, components={**plan.components, "unet": unet}, allow=("int8",))


def curve(plan: Plan) -> list[tuple[int, Plan]]:
    """Budgets from the least that works up to all that helps, and the best plan for each."""
    steps = ((0.6, 1.9), (0.7, 1.5), (0.8, 1.2), (1.0, 1.0), (1.6, 0.95))
    found = [scaled(plan, memory, seconds) for memory, seconds in steps]
    return [(one.peak, one) for one in [*found, resident(plan)]]
