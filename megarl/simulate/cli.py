"""Arguments of `megarl plan`."""

from __future__ import annotations

import argparse
import gc
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megarl.errors import UserError
from megarl.jobs import JOBS

if TYPE_CHECKING:
    from megarl.config.plan import PlanConfig, PlanDtypesConfig, PlanGpuConfig

_OF_THE_PLAN = ("gpu", "dtypes")
"""Sections that a run does not have; with a run's file they are set on the command line."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `megarl plan`."""
    parser.add_argument(
        "-c",
        "--config",
        required=True,
        metavar="FILE",
        help="YAML of a plan (docs/configuration.md), or of a run that trains",
    )
    parser.add_argument(
        "--gpus",
        type=int,
        metavar="N",
        help="number of GPUs of the trainer; default, with a run's file: parallel.num_processes",
    )
    parser.add_argument(
        "--for",
        dest="job",
        choices=[job.name for job in JOBS.values() if job.trains],
        help="job of a run's file; default: inferred from its sections",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures to this file, per GPU")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="settings that override the file; with a run's file also gpu.* and dtypes.* of the plan",
    )


def run(options: argparse.Namespace) -> int:
    """Plan and print; raise UserError with one line per violation."""
    if options.gpus is not None and options.gpus < 1:
        raise UserError(f"--gpus: expected an integer >= 1 (got {options.gpus})")
    config, gpus, notes = _read(options.config, options.overrides, options.gpus, options.job)
    from rich.console import Console

    from megarl.simulate.run import simulate
    from megarl.simulate.show import show

    gc.disable()  # a plan has millions of objects and no cycles: collection would take seconds
    try:
        simulation = simulate(config, gpus)
    finally:
        gc.enable()
    console = Console(highlight=False)
    show(simulation, console)
    for line in notes:
        console.print(f"[yellow]note:[/] {line}")
    if options.json is not None:
        try:
            options.json.write_text(json.dumps(simulation.as_json(), indent=1) + "\n", encoding="utf-8")
        except OSError as error:
            raise UserError(f"--json: cannot write {options.json}: {error.strerror}") from None
    return 0


def _read(
    path: str, overrides: list[str], gpus: int | None, named: str | None
) -> tuple[PlanConfig, int, list[str]]:
    """Return the plan, its number of GPUs, and lines on what it leaves out.

    Only the model's config.json is needed: no tokenizer, no weights, no data.
    """
    from megarl.config.load import load_config
    from megarl.config.plan import PlanConfig

    sections = _sections(path)
    if "run" not in sections and "training" not in sections:
        config = load_config(PlanConfig, path, overrides, check_files=False)
        if gpus is None:
            raise UserError("--gpus: required, the number of GPUs of the trainer")
        return config, gpus, []
    from megarl.config.hub import resolve
    from megarl.config.infer import load_inferred
    from megarl.config.model import read_model_config
    from megarl.simulate.of_run import not_planned, plan_of

    theirs = [each for each in overrides if each.partition(".")[0] not in _OF_THE_PLAN]
    training = [each for each in JOBS.values() if each.trains]
    if gpus is not None:
        theirs.append(f"parallel.num_processes={gpus}")
    [job, *_], settings = load_inferred(path, theirs, training, named, check_files=False)
    settings, problems = resolve(settings)  # an id of the hub: config.json alone is fetched
    if problems:
        raise UserError("\n".join(f"{'.'.join(at)}: {message}" for at, message in problems))
    plan = plan_of(settings, read_model_config(settings.model.path))
    ours = [each for each in overrides if each not in theirs]
    if ours:
        plan = plan.model_copy(update=_hardware(plan, ours))
    return plan, settings.parallel.num_processes, [f"read as megarl {job.name}", *not_planned(settings)]


def _sections(path: str) -> list[str]:
    """Return the names of the file's sections; [] if it cannot be read, which loading it explains."""
    from megarl.config.yaml_text import parse_yaml

    try:
        value: Any = parse_yaml(Path(path).read_text(encoding="utf-8"), path, expand=False).value
    except (OSError, UnicodeDecodeError, UserError):
        return []
    return list(value) if isinstance(value, dict) else []


def _hardware(plan: PlanConfig, overrides: list[str]) -> dict[str, PlanGpuConfig | PlanDtypesConfig]:
    """Return the sections of the plan that ``overrides`` change."""
    from megarl.config.load import load_config
    from megarl.config.plan import PlanConfig

    kept = [
        f"{name}={json.dumps(getattr(plan, name).model_dump())}" for name in ("model", "trainer", "workload")
    ]
    kept += [f"{name}={json.dumps(getattr(plan, name).model_dump())}" for name in _OF_THE_PLAN]
    read = load_config(PlanConfig, None, [*kept, *overrides], check_files=False)
    return {"gpu": read.gpu, "dtypes": read.dtypes}
