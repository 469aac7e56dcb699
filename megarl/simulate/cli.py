"""Arguments of `megarl plan`."""

from __future__ import annotations

import argparse
import gc
import json
from pathlib import Path

from megarl.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The configuration, the number of GPUs and where to write."""
    parser.add_argument(
        "-c", "--config", required=True, metavar="FILE", help="YAML configuration (docs/plan.md)"
    )
    parser.add_argument("--gpus", required=True, type=int, metavar="N", help="GPUs of the trainer")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures, per GPU, to this file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that replace the file's")


def run(options: argparse.Namespace) -> int:
    """Plan and print; UserError with a line for everything that cannot work."""
    from megarl.config.load import load_config
    from megarl.config.plan import PlanConfig

    if options.gpus < 1:
        raise UserError(f"--gpus: expected an integer >= 1 (got {options.gpus})")
    # Only config.json is read, by what the figures need of it: no tokenizer, no weights.
    config = load_config(PlanConfig, options.config, options.overrides, check_files=False)
    from rich.console import Console

    from megarl.simulate.run import simulate
    from megarl.simulate.show import show

    gc.disable()  # a plan is millions of objects without a cycle among them: looking for some takes seconds
    try:
        simulation = simulate(config, options.gpus)
    finally:
        gc.enable()
    console = Console(highlight=False)
    show(simulation, console)
    if options.json is not None:
        try:
            options.json.write_text(json.dumps(simulation.as_json(), indent=1) + "\n", encoding="utf-8")
        except OSError as error:
            raise UserError(f"--json: cannot write {options.json}: {error.strerror}") from None
    return 0
