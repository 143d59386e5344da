"""The tables of a run of `gpu.py`, from its JSON alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

Content = dict[str, Any]
Row = dict[str, Any]


@dataclass(frozen=True)
class Goal:
    """Seconds of a run of so many steps within bytes of memory, and the seconds published for another library."""

    steps: int
    seconds: float
    memory: int
    published: float


GOAL = Goal(steps=28, seconds=29, memory=4 * 2**30, published=41)
"""The network shaped as FLUX.1 on an L20."""


def report(content: Content) -> str:
    """The whole page."""
    parts = [heading(content), *(table(content) for table in TABLES), failures(content)]
    return "\n\n".join(part for part in parts if part)


def heading(content: Content) -> str:
    """What was measured on what."""
    about = content["about"]
    device = about.get("device") or {}
    versions = ", ".join(f"{name} {number}" for name, number in about["versions"].items())
    lines = [
        "# On an accelerator",
        "",
        f"`{about['command']}`, {about['began']}; commit {about['commit'] or 'unknown'}, source {about['source']}.",
        f"{device.get('name', 'no device')} ({giga(device.get('memory'))} GB), link {giga(device.get('to_device'))} "
        f"GB/s to it and {giga(device.get('from_device'))} back; {about['processor']}, {about['cpus']:.0f} processors, "
        f"{giga(about['host_memory'])} GB. Python {about['python']}, CUDA {about['cuda']}; {versions}.",
        f"Not installed: {', '.join(about['not_installed']) or 'nothing that is used here'}.",
    ]
    if about["dry"]:
        lines += ["", "**A dry run on a stand-in: these numbers say nothing about any device.**"]
    return "\n".join(lines)


def results(content: Content, group: str) -> list[tuple[str, Row]]:
    """The rows of a group that came to an end."""
    return [(row["name"], row["result"]) for row in content["rows"] if row["group"] == group and "result" in row]


def bound(content: Content, name: str, row: Row) -> float | None:
    """Seconds that computing alone, or the link alone, would take for a step."""
    alone = row.get("resident_step")
    if alone is None:
        network = name.split(maxsplit=1)[0]
        alone = next((other["step"] for key, other in results(content, "steps") if key == f"{network} 100"), None)
    return None if alone is None else max(alone, row["streamed"] / row["link_rate"])


STEP_COLUMNS = (
    *("row", "step, ms", "bound, ms", "step / bound", "enqueue, ms", "operators", "streamed, GB", "allocated, GB"),
    *("reserved, GB", "more reserved in steps, MB", "host, GB", "pinned, GB", "pinning, s", "set-up, s"),
)


def of_steps(content: Content) -> str:
    """Steps under rules of ours and under other libraries."""
    rows = [step_cells(content, name, row) for name, row in results(content, "steps")]
    told = "`NETWORK 50` keeps half of the weights on the device; 100 is all of them. Other names are other libraries."
    return titled("Steps", told, STEP_COLUMNS, rows)


def of_links(content: Content) -> str:
    """Steps beside slower links."""
    rows = [step_cells(content, name, row) for name, row in results(content, "links")]
    told = "Copies are made again until the link is as slow as the one named; computing is this device's."
    return titled("Slower links", told, STEP_COLUMNS, rows)


def step_cells(content: Content, name: str, row: Row) -> list[str]:
    least = bound(content, name, row)
    times = [milli(row["step"]), milli(least), ratio(row["step"], least), milli(row["enqueue"]), str(row["operators"])]
    memory = [giga(row["streamed"]), giga(row["peak_allocated"]), giga(row["peak_reserved"])]
    more = f"{row['reserved_more_in_steps'] / 1e6:.0f}"
    host = [giga(row["host_peak"]), giga(row.get("pinned")), seconds(row.get("pinning")), seconds(row.get("set_up"))]
    return [name + ("" if row["is_finite"] else " (not finite)"), *times, *memory, more, *host]


def of_another_card(content: Content) -> str:
    """The network shaped as FLUX at another card's ratios."""
    rows = []
    for name, row in results(content, "L20"):
        least = bound(content, name, row)
        cells = [f"{row['run']:.1f}", milli(row["step"]), milli(row["resident_step"]), milli(least)]
        more = [ratio(row["step"], least), giga(row["peak_allocated"]), giga(row["peak_reserved"])]
        rows.append([name, *cells, *more, f"{row['products_ratio']:.2f}", f"{row['link_ratio']:.2f}"])
    columns = ("row", "run, s", "step, ms", "all there, ms", "bound, ms", "step / bound", "allocated, GB",
        "reserved, GB", "layers computed, times", "copies made, times")  # fmt: skip
    told = (
        "The network shaped as FLUX.1 where a step with all weights takes 23.4/28 s and the link gives 25 GB/s, which "
        "are assumptions for an L20: linear layers compute, and copies are made, as often as that takes. A run is "
        f"{GOAL.steps} steps: the first one as measured, and {GOAL.steps - 1} medians. Goal: {GOAL.seconds:.0f} s "
        f"within {GOAL.memory / 2**30:.0f} GiB; {GOAL.published:.0f} s were published for another library within as "
        "much. Not an L20: its kernels, clocks and launches are this device's."
    )
    return titled("As on an L20", told, columns, rows)


def of_calls(content: Content) -> str:
    """Whole calls within budgets."""
    rows = []
    for name, row in results(content, "calls"):
        kept = row["peak_reserved"] <= row["predicted_reserved"]
        same = "equal" if row["equal"] else f"{row['difference']:.1e}"
        sizes = [giga(row[key]) for key in ("predicted_allocated", "peak_allocated")]
        reserved = [giga(row[key]) for key in ("predicted_reserved", "peak_reserved")]
        pace = [seconds(row["predicted_seconds"]), seconds(row["seconds"]), seconds(row["plain_seconds"])]
        shares = (ratio(row["predicted_allocated"], row["peak_allocated"]), ratio(*map(row.get, RESERVED)))
        told = "; ".join(row["degradations"])
        rows.append([name, *sizes, shares[0], *reserved, shares[1], "yes" if kept else "no", row["exactness"], same,
            *pace, told])  # fmt: skip
    columns = ("row", "allocated: predicted, GB", "measured", "ratio", "reserved: predicted, GB", "measured", "ratio",
        "kept", "promised", "result", "predicted, s", "s", "all there, s", "went otherwise")  # fmt: skip
    told = "The number is the budget's share of the way from the least that serves to the most that helps, in %."
    return titled("Calls within budgets", told, columns, rows)


RESERVED = ("predicted_reserved", "peak_reserved")


def of_decodes(content: Content) -> str:
    """Pictures decoded whole and row by row."""
    rows = []
    for name, row in results(content, "decodes"):
        whole, exact = row["whole"], row["exact"]
        cells = [
            seconds(whole.get("seconds")),
            seconds(exact["seconds"]),
            ratio(exact["seconds"], whole.get("seconds")),
        ]
        peaks = [giga(whole.get("peak")), giga(exact["peak"]), ratio(exact["peak"], whole.get("peak"))]
        rows.append([name, *cells, *peaks, f"{row['difference']:.1e}" if "difference" in row else "whole: no room"])
    columns = ("row", "whole, s", "by rows, s", "ratio", "whole, GB", "by rows, GB", "ratio", "difference")
    return titled("Decodes", "Of the autoencoder of Stable Diffusion; peaks without its weights.", columns, rows)


def of_products(content: Content) -> str:
    """Linear layers in 8 bits."""
    rows = []
    for _, found in results(content, "products"):
        for name, row in found.items():
            cells = [
                cell for way in ("bf16", "dequantized", "fp8")
                for cell in (milli(row[way].get("seconds")), percent(row[way].get("relative_error")))
            ]  # fmt: skip
            rows.append([f"{name} {'x'.join(map(str, row['shape']))}", *cells])
    columns = ("rows x in x out", "bf16, ms", "error", "fp8 dequantized, ms", "error", "fp8 product, ms", "error")
    return titled("Products in fp8", "Errors are of the result, against float32.", columns, rows)


TABLES: tuple[Callable[[Content], str], ...] = (
    of_steps, of_links, of_another_card, of_calls, of_decodes, of_products)  # fmt: skip


def failures(content: Content) -> str:
    """What did not come to an end, and what was not begun."""
    failed = [f"- {row['name']}: {row['error']}" for row in content["rows"] if "error" in row]
    skipped = [f"- {name}: {reason}" for name, reason in content["skipped"].items()]
    parts = [("## Failed", failed), ("## Left out", skipped)]
    return "\n\n".join("\n".join([title, "", *lines]) for title, lines in parts if lines)


# ---- text


def titled(title: str, told: str, columns: Iterable[str], rows: list[list[str]]) -> str:
    """A table under a title; nothing where it has no rows."""
    if not rows:
        return ""
    head = [line(columns), line("---" for _ in columns)]
    return "\n".join([f"## {title}", "", told, "", *head, *(line(row) for row in rows)])


def line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def giga(number: float | None) -> str:
    return "" if number is None else f"{number / 1e9:.2f}"


def milli(number: float | None) -> str:
    return "" if number is None else f"{number * 1e3:.3g}"


def seconds(number: float | None) -> str:
    return "" if number is None else f"{number:.2f}"


def percent(number: float | None) -> str:
    return "" if number is None else f"{number:.2%}"


def ratio(number: float | None, other: float | None) -> str:
    return f"{number / other:.2f}" if number is not None and other else ""
