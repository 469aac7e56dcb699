"""The report's section on memory: the plan's figures beside what was measured."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

from megarl.metrics.report_data import RunData
from megarl.metrics.summary import as_number

_GIB = 2**30
# Parts of one device's memory, which add up; colours of the page by their order.
_PARTS = {
    "parameters": "parameters",
    "gradients": "gradients",
    "optimizer": "optimizer",
    "reference": "reference model",
    "merged": "LoRA, merged for engines",
    "critic": "critic",
    "gathered": "gathered by FSDP",
    "activations": "activations and buffers",
    "other": "activations, buffers, libraries",
    "engine_parameters": "engines' own parameters",
    "kv_cache": "KV cache",
}
_OF_ENGINES = {"engine_parameters": "memory_engine_parameters_gib", "kv_cache": "memory_engine_kv_cache_gib"}


def memory_section(run: RunData) -> str:
    """Return the plan's and the measured memory as bars of one scale and a table; "" without either."""
    planned = {name: float(size) for name, size in _planned(run).items() if name in _PARTS}
    measured, fullest = _measured(run), _fullest_rank(run)
    if not planned and not measured:
        return ""
    columns = {"plan": planned, "rank 0": measured, "fullest rank": fullest}
    columns = {name: sizes for name, sizes in columns.items() if sizes}
    scale = max(sum(sizes.values()) for sizes in columns.values()) or 1.0
    names = [name for name in _PARTS if any(name in sizes for sizes in columns.values())]
    colors = {name: f"var(--s{i % 6})" for i, name in enumerate(names)}
    bars = "".join(_bar(title, sizes, colors, scale) for title, sizes in columns.items())
    heads = "".join(f"<th>{escape(title)}</th>" for title in columns)
    rows = "".join(
        f'<tr><th><i style="background: {colors[name]}"></i>{escape(_PARTS[name])}</th>'
        + "".join(f"<td>{_cell(sizes.get(name))}</td>" for sizes in columns.values())
        + "</tr>"
        for name in names
    )
    totals = "".join(f"<td>{_cell(sum(sizes.values()))}</td>" for sizes in columns.values())
    return f"""<h3>Memory by part</h3>
<div class="chart"><div class="timeline">{bars}</div>
<table class="facts-table memory-table"><tr><td></td>{heads}</tr>{rows}<tr><th>sum</th>{totals}</tr></table>
<p class="soft">The plan counts as megarl plan does, before activations and an engine's own weights.
Ranks are measured at the last step: tensors by part, the rest of the peak; engines at rank 0.</p></div>"""


def bytes_in_words(count: float) -> str:
    """Return a number of bytes with four digits and its unit."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.4g} {unit}"
        count /= 1024
    return f"{count:.4g} TiB"


def _cell(size: float | None) -> str:
    return "–" if size is None else bytes_in_words(size)


def _bar(title: str, sizes: Mapping[str, float], colors: Mapping[str, str], scale: float) -> str:
    parts = "".join(
        f'<i style="width: {100 * sizes[name] / scale:.3f}%; background: {color}" '
        f'title="{escape(_PARTS[name])}: {bytes_in_words(sizes[name])}"></i>'
        for name, color in colors.items()
        if sizes.get(name)
    )
    total = bytes_in_words(sum(sizes.values()))
    return (
        f'<div class="timeline-row memory-row"><span>{escape(title)}</span>'
        f'<div class="bar-row">{parts}</div><span class="soft">{total}</span></div>'
    )


def _planned(run: RunData) -> Mapping[str, float]:
    found: Mapping[str, float] = (run.starts[-1].get("memory_bytes") or {}) if run.starts else {}
    return found


def _measured(run: RunData) -> dict[str, float]:
    """Return bytes by part at the last step that has them."""
    measured = (step for step in reversed(run.steps) if "memory_parameters_gib" in step)
    step: Mapping[str, Any] = next(measured, {})
    found = {}
    for name in _PARTS:
        size = as_number(step.get(_OF_ENGINES.get(name, f"memory_{name}_gib")))
        if size is not None:
            found[name] = size * _GIB
    return found


def _fullest_rank(run: RunData) -> dict[str, float]:
    """Return the bytes of the rank whose trainer has most, of several; without engines."""
    lines = run.timeline[max(run.timeline)] if run.timeline else {}
    ranks = [line["memory"] for line in lines.values() if line.get("memory")]
    parts = [{name: float(rank[name]) for name in _PARTS if name in rank} for rank in ranks]
    return max(parts, key=lambda sizes: sum(sizes.values())) if len(parts) > 1 else {}
