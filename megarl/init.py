"""`megarl init`: a first configuration of a job, with the schema's words as comments."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megarl.cluster.devices import find_driver
from megarl.config.data import FILE_KINDS
from megarl.config.hub import is_id
from megarl.config.introspect import fields_at
from megarl.config.load import load_config
from megarl.config.yaml_text import dump_yaml
from megarl.errors import UserError
from megarl.jobs import JOBS, PROBLEMS, Job

_QUESTIONS = ("question", "problem", "instruction", "query", "input")
_ANSWERS = ("solution", "final_answer", "ground_truth", "label", "output")
_LONGEST = 2048  # tokens of a sequence, where the model has as many positions
_EPOCHS = 3
_STEPS = 200
_LEARNING_RATES = {"sft": 1e-5, "dpo": 5e-7, "rm": 1e-5, "grpo": 1e-6, "ppo": 1e-6, "distill": 1e-6}
_COMMENT = 78  # characters


@dataclass(frozen=True, slots=True)
class Answers:
    """Answers that a first configuration needs."""

    job: Job
    model: str
    data: str
    teacher: str | None
    out: Path


def run(options: argparse.Namespace) -> int:
    """Ask for what is missing, write the file, and say how to go on."""
    answers = ask(options)
    if answers.out.exists():
        raise UserError(f"--out: {answers.out} exists already; choose another, or remove it")
    settings = settings_of(answers)
    overrides = [f"{key}={json.dumps(value)}" for key, value in settings.items()]
    load_config(answers.job.root(), None, overrides)  # nothing is written that cannot be run
    try:
        answers.out.write_text(text_of(answers.job, settings), encoding="utf-8")
    except OSError as error:
        raise UserError(f"--out: cannot write {answers.out}: {error.strerror}") from None
    print(f"wrote {answers.out}; next: megarl {answers.job.name} {answers.out} --dry-run")
    return 0


def ask(options: argparse.Namespace) -> Answers:
    """Return the answers: options, and on a terminal replies.

    Raises:
        UserError: something is missing, and there is no terminal to ask at; or --teacher without use.
    """
    missing = [name for name in ("job", "model", "data") if getattr(options, name) is None]
    if options.job == "distill" and options.teacher is None:
        missing.append("teacher")
    if missing and not sys.stdin.isatty():
        raise UserError(f"megarl init: {', '.join(map(_argument, missing))} required without a terminal")
    name = options.job or _reply(
        "job", "; ".join(f"{job.name}: {job.help}" for job in JOBS.values()), list(JOBS)
    )
    job = JOBS[name]
    model = options.model or _reply("model", "a Hugging Face directory, or an id of the hub (org/name)")
    data = options.data or _reply(
        "data", f"a file of {job.data.noun}, org/name on the hub, or a reasoning-gym task"
    )
    teacher = options.teacher
    if name == "distill" and teacher is None:
        teacher = _reply("teacher", "a larger model's directory or id")
    if name != "distill" and teacher is not None:
        raise UserError(f"--teacher: megarl {name} has none")
    out = options.out
    if out is None:
        default = f"{name}.yaml"
        out = Path(
            _reply("out", f"file to write, Enter for {default}", default=default) if missing else default
        )
    return Answers(job, model, data, teacher, out)


def _argument(name: str) -> str:
    return "JOB" if name == "job" else f"--{name}"


def _reply(name: str, about: str, choices: list[str] | None = None, default: str | None = None) -> str:
    """Ask at the terminal until there is an answer."""
    print(about)
    while True:
        try:
            text = input(f"{name}: ").strip() or default or ""
        except EOFError:
            raise UserError(f"megarl init: no {name} was given: {_argument(name)} names it") from None
        if text and (choices is None or text in choices):
            return text
        if text and choices is not None:
            print(f"one of {', '.join(choices)}")


# --- settings ------------------------------------------------------------------------------------


def settings_of(answers: Answers) -> dict[str, Any]:
    """Return dotted key -> value; every key is one of the job's configuration.

    Raises:
        UserError: the data is neither a file, nor an id of the hub, nor a task.
    """
    job, source = answers.job, source_of(answers.data, answers.job)
    rows = _num_rows(source)
    longest = _longest(answers.model)
    split = "train" if job.trains else "held_out"
    settings: dict[str, Any] = {
        "run.dir": f"runs/{answers.out.stem}",
        "model.path": answers.model,
        "model.dtype": "bfloat16" if _has_gpu() else "float32",
    }
    if answers.teacher is not None:
        settings["teacher.path"] = answers.teacher
    settings |= {f"data.{split}.{key}": value for key, value in source.items()}
    if (template := _has_template(answers.model)) is not None:
        settings["data.format.chat_template"] = template
    if job.data is PROBLEMS:
        settings |= _sampling(job, rows, longest)
    if job.trains:
        settings |= _training(job, rows, longest)
    return settings


def _sampling(job: Job, rows: int | None, longest: int) -> dict[str, Any]:
    found: dict[str, Any] = {"rollout.max_new_tokens": longest // 2}
    if _has_gpu():
        found["rollout.engine.kv_cache_gib"] = 8.0
    if not job.trains:
        return found | {"evaluation.num_prompts": None}
    return found | {
        "rollout.num_prompts_per_step": min(16, rows or 16),
        "rollout.num_generations_per_prompt": 1 if job.name == "distill" else 8,
    }


def _training(job: Job, rows: int | None, longest: int) -> dict[str, Any]:
    length: dict[str, Any] = {"training.num_steps": _STEPS}
    if job.data is not PROBLEMS:
        length = {"training.num_epochs": _EPOCHS, "training.batch_size": min(16, rows or 16)}
    few = rows is not None and rows < _STEPS
    return {
        **length,
        "optimizer.lr": _LEARNING_RATES[job.name],
        "optimizer.lr_warmup_steps": 0 if few else 10,
        "packing.max_tokens_per_microbatch": max(4096, 2 * longest),
        "packing.max_sequence_length": longest,
        "checkpoint.interval": 50,
    }


def source_of(data: str, job: Job) -> dict[str, Any]:
    """Return the data source that ``data`` names, with the columns of a JSONL file."""
    path = Path(data)
    if path.suffix.lower() in FILE_KINDS or path.is_file():
        kind = "jsonl" if path.suffix.lower() == ".jsonl" else "file"
        return {"source": kind, "path": data, **_columns(path, job)}
    if path.is_dir() or is_id(data):
        return {"source": "hf", "dataset": data}
    if data.isidentifier():
        return {"source": "reasoning_gym", "task": data, "size": 1000}
    raise UserError(
        f"--data: no such file, and neither an id of the hub (org/name) nor a task of "
        f"reasoning-gym (got {data!r})"
    )


def _columns(path: Path, job: Job) -> dict[str, str]:
    """Return the columns of prompts and answers where they have other names than the defaults."""
    if job.data is not PROBLEMS or path.suffix.lower() != ".jsonl":
        return {}
    row = _first_row(path)
    found = {}
    for field, usual, names in (("prompt_field", "prompt", _QUESTIONS), ("answer_field", "answer", _ANSWERS)):
        if usual not in row and (other := next((name for name in names if name in row), None)):
            found[field] = other
    return found


def _first_row(path: Path) -> Mapping[str, Any]:
    try:
        with path.open(encoding="utf-8") as lines:
            row = json.loads(next(iter(lines), "{}"))
    except (OSError, ValueError):  # loading the configuration or the data says what is wrong
        return {}
    return row if isinstance(row, dict) else {}


def _num_rows(source: Mapping[str, Any]) -> int | None:
    """Return the number of rows where it is quick to know."""
    if source["source"] == "reasoning_gym":
        return int(source["size"])
    if source["source"] != "jsonl":
        return None
    try:
        with open(source["path"], "rb") as file:
            return sum(1 for line in file if line.strip()) or None
    except OSError:
        return None


def _longest(model: str) -> int:
    try:
        config = json.loads((Path(model) / "config.json").read_text(encoding="utf-8"))
        return min(_LONGEST, int(config["max_position_embeddings"]))
    except (OSError, ValueError, KeyError, TypeError):
        return _LONGEST


def _has_template(model: str) -> bool | None:
    """Return whether a local model has a chat template, None where it is not known."""
    directory = Path(model)
    if not directory.is_dir():
        return None
    if (directory / "chat_template.jinja").is_file():
        return True
    try:
        return "chat_template" in json.loads(
            (directory / "tokenizer_config.json").read_text(encoding="utf-8")
        )
    except (OSError, ValueError):
        return None


def _has_gpu() -> bool:
    driver = find_driver()
    return driver is not None and driver.num_devices > 0


# --- text ----------------------------------------------------------------------------------------


def text_of(job: Job, settings: Mapping[str, Any]) -> str:
    """Return YAML with a comment on every setting, from the schema."""
    lines = [
        f"# megarl {job.name}: {job.help}",
        f"# All settings: docs/configuration.md; one of them: megarl config SECTION.KEY --for {job.name}",
    ]
    open_sections: tuple[str, ...] = ()
    for key, value in settings.items():
        *sections, name = key.split(".")
        for depth, section in enumerate(sections):
            if open_sections[: depth + 1] != tuple(sections[: depth + 1]):
                lines += [""] * (depth == 0) + [f"{'  ' * depth}{section}:"]
        open_sections = tuple(sections)
        text = dump_yaml({name: value}).rstrip("\n")
        setting = f"{'  ' * len(sections)}{text}"
        comment = _comment(job, key)
        lines.append(f"{setting}  # {comment}" if comment else setting)
    return "\n".join(lines) + "\n"


def _comment(job: Job, key: str) -> str:
    fields = fields_at(job.root(), tuple(key.split(".")))
    text = " ".join((fields[0].description or "").split()) if fields else ""
    first = text.partition(". ")[0].rstrip(".")
    return first if len(first) <= _COMMENT else f"{first[: _COMMENT - 3].rsplit(' ', 1)[0]} ..."
