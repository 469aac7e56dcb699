"""The HTML report of a run: one self-contained file.

The page has headline metrics and checks (plain HTML, readable without JavaScript) and the metrics and
samples as JSON, drawn by the scripts in page/. Text from a run is escaped where it becomes HTML and
inserted as text nodes by the scripts; a content security policy admits no other script.
"""

from __future__ import annotations

import base64
import hashlib
import math
from collections.abc import Iterable
from datetime import datetime
from html import escape
from pathlib import Path
from typing import Any

from megarl.metrics.checks import DIFFERENCE_LIMITS, Check, run_checks
from megarl.metrics.report_data import MAX_SAMPLE_BYTES, RunData, chart_columns, read_run
from megarl.metrics.summary import as_number
from megarl.run_directory import to_json, write_atomically

_PAGE = Path(__file__).parent / "page"
_SCRIPTS = ("charts.js", "samples.js", "page.js")


def write_report(run_dir: Path) -> Path:
    """Write <run_dir>/report.html atomically from the current files; return its path.

    Takes well under a second for 1,000 steps, so that a running job can call it often.

    Raises:
        UserError: not a run directory, or a file in it is damaged (names file and line).
    """
    path = run_dir / "report.html"
    write_atomically(path, render(read_run(run_dir)))
    return path


def render(run: RunData) -> str:
    """Return the page."""
    script = "".join((_PAGE / name).read_text(encoding="utf-8") for name in _SCRIPTS)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src 'sha256-{digest}'"
    style = (_PAGE / "report.css").read_text(encoding="utf-8")
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(run.name)} · MegaRL</title>
<style>{style}</style>
</head>
<body>
<div class="top"><div class="bar"><span class="mark">Mega<span>RL</span></span>
<nav><a href="#charts">Charts</a>{'<a href="#samples">Samples</a>' if run.is_online else ""}
<a href="#configuration">Config</a></nav>
<button class="quiet" id="theme" type="button" hidden></button></div></div>
<main>
{_heading(run)}
{_checks(run_checks(run.steps, _dtype(run))) if run.steps else ""}
<dl class="figures">{"".join(_figures(run))}</dl>
{_charts(run)}
{_samples(run)}
<h2 id="configuration">Configuration</h2>
<details><summary>config.yaml, as resolved</summary><pre>{escape(run.config_text)}</pre></details>
<footer>Written by MegaRL. Numbers are those of metrics.jsonl in the run directory.</footer>
</main>
<script type="application/json" id="run-data">{_embedded(run)}</script>
<script>{script}</script>
</body>
</html>
"""


def _embedded(run: RunData) -> str:
    """Return the page's data as JSON that cannot close its script element."""
    head = to_json(
        {
            "steps": [step["step"] for step in run.chart_steps],
            "series": chart_columns(run.chart_steps),
            "phase_seconds": run.summary.get("phase_seconds"),
            "difference_limit": DIFFERENCE_LIMITS[_dtype(run)],
        },
        separators=(",", ":"),
    )
    samples = f'{{"records":[{",".join(run.samples.records)}]}}'
    return f'{head[:-1]},"samples":{samples}}}'.replace("<", "\\u003c")


def _heading(run: RunData) -> str:
    planned = run.config.get("training", {}).get("num_steps")
    done = run.steps[-1]["step"] if run.steps else 0
    progress = f"Step {done:,} of {planned:,}" if planned else f"Step {done:,}"
    badge = (
        '<span class="badge ok">Finished</span>' if run.finished else f'<span class="badge">{progress}</span>'
    )
    facts = {
        "": run.kind.upper(),
        "Model": run.config.get("model", {}).get("path"),
        "Type": run.config.get("model", {}).get("dtype"),
        "Seed": run.config.get("run", {}).get("seed"),
        "Updated": datetime.now().astimezone().strftime("%Y-%m-%d %H:%M:%S %Z"),
    }
    shown = "".join(
        f"<span>{name} <b>{escape(str(value))}</b></span>"
        for name, value in facts.items()
        if value is not None
    )
    return f'<h1>{escape(run.name)}</h1>\n<div class="facts">{badge}{shown}</div>'


def _checks(checks: Iterable[Check]) -> str:
    items = "".join(f'<li class="{check.tone}"><span>{escape(check.text)}</span></li>' for check in checks)
    return f'<ul class="checks">{items}</ul>'


def _figures(run: RunData) -> Iterable[str]:
    """Yield the headline metrics that the run has."""
    summary = run.summary
    if run.is_online:
        yield _change("Accuracy, held-out", summary, "accuracy", percent=True)
        yield _change("Mean reward", summary, "reward_mean")
    else:
        yield _change("Preference accuracy, held-out", summary, "validation_accuracy", percent=True)
        yield _change("Validation loss", summary, "validation_loss")
        yield _change("Training loss", summary, "loss")
    trained = [step for step in run.steps if step["step"] > 0]
    yield _figure("Steps", f"{trained[-1]['step'] if trained else 0:,}", _per_step(summary, len(trained)))
    if (seconds := as_number(summary.get("wall_seconds"))) is not None:
        yield _figure("Wall time", _duration(seconds), "")
    for phase, label in (("rollout", "Rollout"), ("train", "Training")):
        if rate := as_number(summary.get("tokens_per_second", {}).get(phase)):
            yield _figure(f"{label} speed", f"{rate:,.0f} tok/s", "")
    if (moved := as_number(summary.get("weights_bytes_moved"))) is not None:
        note = "the engine reads the trainer's memory" if moved == 0 else "trainer to engine, all steps"
        yield _figure("Weights moved", _bytes(moved), note, "ok" if moved == 0 else "")
    if (difference := as_number(summary.get("logprob_abs_diff_max"))) is not None:
        limit = DIFFERENCE_LIMITS[_dtype(run)]
        tone, word = ("ok", "below") if difference <= limit else ("warn", "above")
        yield _figure(
            "Largest logprob difference",
            _number(difference),
            f"{word} the {_dtype(run)} limit {limit:g}",
            tone,
        )


def _figure(label: str, value_html: str, note: str, tone: str = "") -> str:
    tone_class = f' class="tone-{tone}"' if tone else ""
    note_html = f"<p>{escape(note)}</p>" if note else ""
    return f"<div><dt>{escape(label)}</dt><dd{tone_class}>{value_html}</dd>{note_html}</div>"


def _change(label: str, summary: dict[str, Any], name: str, percent: bool = False) -> str:
    before, after = as_number(summary.get(f"{name}_before")), as_number(summary.get(f"{name}_after"))
    if before is None and after is None:
        return ""

    def shown(value: float | None) -> str:
        return "–" if value is None else f"{value:.1%}" if percent else _number(value)

    value, note = shown(after), ""
    if before is not None:
        value = f'<span class="from">{shown(before)}</span><span class="arrow"> → </span>{value}'
    if before is not None and after is not None:
        note = f"{100 * (after - before):+.1f} points" if percent else f"{after - before:+.3f}, first to last"
    return _figure(label, value, note)


def _per_step(summary: dict[str, Any], num_steps: int) -> str:
    seconds = as_number(summary.get("wall_seconds"))
    return f"{seconds / num_steps:.3g} s per step" if seconds and num_steps else ""


def _charts(run: RunData) -> str:
    if not run.steps:
        return '<h2 id="charts">Charts</h2><p class="soft">No step has been logged yet.</p>'
    thinned = ""
    if len(run.chart_steps) < len(run.steps):
        thinned = (
            f'<p class="soft">Curves show {len(run.chart_steps):,} of {len(run.steps):,} steps: evenly '
            "spaced ones, the worst of each stretch, and all evaluations.</p>"
        )
    return f"""<div class="head" id="charts"><h2>Charts</h2>
<label>Smoothing <input type="range" id="smoothing" min="0" max="0.98" step="0.01" value="0">
<output id="smoothing-value"></output></label></div>
{thinned}<noscript><p class="soft">The charts need JavaScript, which is switched off here.</p></noscript>
<div id="chart-sections"></div>
<div id="phases" hidden><h3>Time by phase, whole run</h3>
<div class="chart"><div class="share" id="phase-share"></div>
<div class="legend" id="phase-legend"></div></div></div>"""


def _samples(run: RunData) -> str:
    selection = run.samples
    if not run.is_online:
        return ""
    if not selection.records:
        return '<h2 id="samples">Samples</h2><p class="soft">No samples were recorded.</p>'
    held = (
        f"{len(selection.records):,} of the {selection.num_in_steps:,} samples recorded at "
        f"{selection.num_steps_shown:,} of {selection.num_steps:,} steps"
    )
    return f"""<section id="samples"><h2>Samples</h2>
<p class="soft">This page holds {held} (at most {MAX_SAMPLE_BYTES // 2**20} MiB of text);
samples/ in the run directory has all of them.</p>
<div id="sample-browser"></div></section>"""


def _dtype(run: RunData) -> str:
    dtype = run.config.get("model", {}).get("dtype", "float32")
    return dtype if dtype in DIFFERENCE_LIMITS else "float32"


def _number(value: float) -> str:
    """Format with three significant digits, small numbers as 2.2e-4."""
    if value == 0 or abs(value) >= 1e-3 or not math.isfinite(value):
        return f"{value:#.3g}".rstrip(".")
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def _bytes(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.4g} {unit}"
        count /= 1024
    return f"{count:.4g} TiB"
