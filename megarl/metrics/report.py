"""The HTML report of a run: one self-contained file.

The page has headline metrics and checks (plain HTML, readable without JavaScript) and the metrics and
samples as JSON, drawn by the scripts in page/. Text from a run is escaped where it becomes HTML and
inserted as text nodes by the scripts; a content security policy admits no other script.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from datetime import datetime
from html import escape
from pathlib import Path
from typing import Any

from megarl.metrics.checks import DIFFERENCE_LIMITS, Check, run_checks
from megarl.metrics.compare import compare
from megarl.metrics.compare import read as read_compared
from megarl.metrics.report_data import MAX_SAMPLE_BYTES, RunData, chart_columns, read_run
from megarl.metrics.report_memory import bytes_in_words, memory_section
from megarl.metrics.report_series import Best
from megarl.metrics.summary import as_number
from megarl.run_directory import to_json, write_atomically

_PAGE = Path(__file__).parent / "page"
_SCRIPTS = ("charts.js", "tokens.js", "samples.js", "timeline.js", "ranks.js", "rewards.js", "page.js")


def write_report(run_dir: Path) -> Path:
    """Write <run_dir>/report.html atomically from the current files; return its path.

    Takes well under a second for 1,000 steps, so that a running job can call it often.

    Raises:
        UserError: not a run directory, or a file in it is damaged (names file and line).
    """
    path = run_dir / "report.html"
    write_atomically(path, render(read_run(run_dir)))
    return path


def write_comparison(run_dirs: Sequence[Path]) -> Path:
    """Write <first run>/compare.html, the first run's report with the others' curves; return its path.

    Raises:
        UserError: as :func:`write_report`.
    """
    path = run_dirs[0] / "compare.html"
    write_atomically(path, render_runs(run_dirs))
    return path


def render_runs(run_dirs: Sequence[Path], version: str | None = None) -> str:
    """Return the page of the first run, with the others' curves and what differs; see :func:`render`."""
    first, *others = (read_run(path) for path in run_dirs)
    names = [each.name for each in (first, *others)]
    return render(first, version, others, _differences(run_dirs, names) if others else "")


def render(
    run: RunData, version: str | None = None, others: Sequence[RunData] = (), differences: str = ""
) -> str:
    """Return the page, with the curves of ``others`` and a table of ``differences`` (HTML).

    With ``version`` it follows the run: it asks its server for "version", and loads again when that differs.
    """
    script = "".join((_PAGE / name).read_text(encoding="utf-8") for name in _SCRIPTS)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src 'sha256-{digest}'"
    if version is not None:
        policy += "; connect-src 'self'"
    glossary = json.loads((_PAGE / "glossary.json").read_text(encoding="utf-8"))
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
{'<a href="#evaluations">Evaluations</a>' if run.answers.records else ""}
<a href="#configuration">Run</a></nav>
<button class="quiet" id="theme" type="button" hidden></button></div></div>
<main>
{_heading(run)}
{_checks(run_checks(run.steps, _dtype(run))) if run.steps else ""}
<dl class="figures">{"".join(_figures(run))}</dl>
{differences}
{_charts(run)}
{_samples(run)}
{_answers(run)}
<h2 id="configuration">Run</h2>
{"".join(_provenance(run))}
<details><summary>Configuration (config.yaml, as resolved)</summary>
<pre>{escape(run.config_text)}</pre></details>
{_glossary(run, glossary)}
<footer>Written by MegaRL. Numbers are those of metrics.jsonl in the run directory.</footer>
</main>
<script type="application/json" id="run-data">{_embedded(run, glossary, version, others)}</script>
<script>{script}</script>
</body>
</html>
"""


def _embedded(
    run: RunData, glossary: Mapping[str, str], version: str | None, others: Sequence[RunData]
) -> str:
    """Return the page's data as JSON that cannot close its script element."""
    series = chart_columns(run.chart_steps)
    head = to_json(
        {
            "steps": [step["step"] for step in run.chart_steps],
            "series": series,
            "axes": run.axes,
            "best": None if run.best is None else asdict(run.best),
            "glossary": dict(_meanings(series, glossary)),
            "version": version,
            "name": run.name,
            "others": [
                {
                    "name": other.name,
                    "steps": [step["step"] for step in other.chart_steps],
                    "series": chart_columns(other.chart_steps),
                    "axes": other.axes,
                }
                for other in others
            ],
            "phase_seconds": run.summary.get("phase_seconds"),
            "rewards": run.rewards,
            "timeline": [
                {"step": step, "ranks": [{"rank": rank, **line} for rank, line in lines.items()]}
                for step, lines in sorted(run.timeline.items())
            ],
            "difference_limit": DIFFERENCE_LIMITS[_dtype(run)],
        },
        separators=(",", ":"),
    )
    samples = f'{{"records":[{",".join(run.samples.records)}]}}'
    answers = f'{{"records":[{",".join(run.answers.records)}]}}'
    return f'{head[:-1]},"samples":{samples},"answers":{answers}}}'.replace("<", "\\u003c")


def _meanings(names: Iterable[str], glossary: Mapping[str, str]) -> Iterable[tuple[str, str]]:
    """Yield (metric, meaning) of the metrics that the glossary has, by name or by family ("stale_*")."""
    families = {name[:-1]: text for name, text in glossary.items() if name.endswith("*")}
    for name in names:
        text = glossary.get(name)
        if text is None:
            text = next((each for start, each in families.items() if name.startswith(start)), None)
        if text is not None:
            yield name, text


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
        yield _change("Accuracy, held-out", summary, "accuracy", percent=True, best=run.best)
        yield _change("Mean reward", summary, "reward_mean")
    else:
        yield _change(
            "Preference accuracy, held-out", summary, "validation_accuracy", percent=True, best=run.best
        )
        yield _change("Validation loss", summary, "validation_loss", best=run.best)
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
        yield _figure("Weights moved", bytes_in_words(moved), note, "ok" if moved == 0 else "")
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


def _change(
    label: str, summary: dict[str, Any], name: str, percent: bool = False, best: Best | None = None
) -> str:
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
    if best is not None and best.metric == name and best.value != best.last:
        note = f"{note}; best {shown(best.value)} at step {best.step}"
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
<label>x axis <select id="x-axis"></select></label>
<button class="quiet" id="reset-zoom" type="button" hidden>Reset zoom</button>
<label>Smoothing <input type="range" id="smoothing" min="0" max="0.98" step="0.01" value="0">
<output id="smoothing-value"></output></label></div>
{thinned}<p class="soft hint">Drag over a chart to zoom; click a point for the samples of its step.</p>
<noscript><p class="soft">The charts need JavaScript, which is switched off here.</p></noscript>
<div id="chart-sections"></div>
<div id="rewards"></div>
<div id="phases" hidden><h3>Time by phase, whole run</h3>
<div class="chart"><div class="share" id="phase-share"></div>
<div class="legend" id="phase-legend"></div></div></div>
<div id="timeline"></div>
<div id="rank-timeline"></div>
{memory_section(run)}"""


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


def _differences(run_dirs: Sequence[Path], names: Sequence[str]) -> str:
    """Return a table of results, paired differences and settings of runs, as megarl compare finds them."""
    found = compare([read_compared(path) for path in run_dirs])
    heads = "".join(f"<th>{escape(name)}</th>" for name in names)
    rows = [(name, _final_cells(name, finals, found["paired"])) for name, finals in found["final"].items()]
    rows += _problem_rows(found["paired"])
    rows += [(key, [_setting(value) for value in values]) for key, values in found["configuration"].items()]
    body = "".join(
        f"<tr><th>{escape(name)}</th>{''.join(f'<td>{escape(cell)}</td>' for cell in cells)}</tr>"
        for name, cells in rows
    )
    return f"""<h2 id="differences">Differences</h2>
<table class="facts-table"><tr><td></td>{heads}</tr>{body}</table>
<p class="soft">In brackets: mean difference to the first run over the steps, or problems, that both have, and
its 95% interval.</p>"""


def _final_cells(
    name: str, finals: Sequence[Mapping[str, Any] | None], paired: Sequence[Mapping[str, Any]]
) -> list[str]:
    """Return a metric's last value of each run, with the paired difference over steps."""
    cells = ["–" if final is None else _number(final["value"]) for final in finals]
    for i, pair in enumerate(paired, start=1):
        if name in pair["steps"]:
            cells[i] += f" ({_difference(pair['steps'][name])})"
    return cells


def _problem_rows(paired: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[str]]]:
    """Return a row with the accuracies on the problems that all compared evaluations have."""
    found = [pair["problems"] for pair in paired]
    if not any(found):
        return []
    first = next(each for each in found if each)["accuracy"][0]
    others = [f"{each['accuracy'][1]:.1%} ({_difference(each)})" if each else "–" for each in found]
    return [("accuracy on the same problems", [f"{first:.1%}", *others])]


def _difference(found: Mapping[str, Any]) -> str:
    interval = found["interval"]
    limits = "" if interval is None else f", {interval[0]:+.3g} to {interval[1]:+.3g}"
    return f"{found['mean']:+.3g}{limits}"


def _setting(value: Any) -> str:
    return "–" if value is None else value if isinstance(value, str) else json.dumps(value)


def _answers(run: RunData) -> str:
    selection = run.answers
    if not selection.records:
        return ""
    return f"""<section id="evaluations"><h2>Evaluations</h2>
<p class="soft">{len(selection.records):,} of the {selection.num_in_steps:,} answers of
{selection.num_steps_shown:,} of {selection.num_steps:,} evaluations;
evaluations/ in the run directory has all.</p>
<div id="answer-browser"></div></section>"""


def _provenance(run: RunData) -> Iterable[str]:
    """Yield what the run was made by and of: its last start, packages, data and model files."""
    if run.starts:
        start, times = run.starts[-1], len(run.starts)
        rows = {
            "Command": start.get("command"),
            "In": start.get("directory"),
            "Started": f"{start.get('time')}" + (f" (start {times} of the run)" if times > 1 else ""),
            "Commit": start.get("commit"),
            "Host": f"{start.get('host')}: {start.get('cores')} cores, {start.get('device')}",
            "Ranks": start.get("num_ranks"),
            "System": f"{start.get('system')}, Python {start.get('python')}",
        }
        yield _table(rows)
    versions = {
        name.removeprefix("package "): files.get("version")
        for name, files in run.inputs.items()
        if name.startswith("package ")
    }
    files = [
        (key, name, facts)
        for key, found in run.inputs.items()
        if not key.startswith("package ")
        for name, facts in found.items()
    ]
    if versions:
        yield f"<details><summary>Packages</summary>{_table(versions)}</details>"
    if files:
        rows = {f"{key}: {name}": _fingerprint(facts) for key, name, facts in files}
        yield f"<details><summary>Data, model and code files</summary>{_table(rows)}</details>"


def _fingerprint(facts: Any) -> str:
    if not isinstance(facts, dict):
        return str(facts)
    return ", ".join(f"{name} {value}" for name, value in facts.items() if name != "mtime_ns")


def _table(rows: Mapping[str, Any]) -> str:
    cells = "".join(
        f"<tr><th>{escape(str(name))}</th><td>{escape(str(value))}</td></tr>"
        for name, value in rows.items()
        if value is not None
    )
    return f'<table class="facts-table">{cells}</table>'


def _glossary(run: RunData, glossary: Mapping[str, str]) -> str:
    names = dict.fromkeys(name for step in run.chart_steps for name in step if name != "step")
    if not (found := dict(_meanings(names, glossary))):
        return ""
    return f"<details><summary>Metrics of this run</summary>{_table(found)}</details>"


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
