"""Arguments of `megarl plan`."""

from __future__ import annotations

import argparse
import gc
import json
from pathlib import Path

from megarl.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `megarl plan`."""
    parser.add_argument(
        "-c", "--config", required=True, metavar="FILE", help="YAML configuration (docs/configuration.md)"
    )
    parser.add_argument("--gpus", required=True, type=int, metavar="N", help="number of GPUs of the trainer")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures to this file, per GPU")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that override the file")


def run(options: argparse.Namespace) -> int:
    """Plan and print; raise UserError with one line per violation."""
    from megarl.config.load import load_config
    from megarl.config.plan import PlanConfig

    if options.gpus < 1:
        raise UserError(f"--gpus: expected an integer >= 1 (got {options.gpus})")
    # Only config.json is needed: no tokenizer, no weights.
    config = load_config(PlanConfig, options.config, options.overrides, check_files=False)
    from rich.console import Console

    from megarl.simulate.run import simulate
    from megarl.simulate.show import show

    gc.disable()  # a plan has millions of objects and no cycles: collection would take seconds
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
