"""The `megarl` command line.

Exit codes: 0 success; 1 a bug (with its traceback); 2 a user error (one line each); 130 after Ctrl-C; 143
after SIGTERM. Heavy packages are imported only after the configuration is valid.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megarl import __version__
from megarl.arguments import (
    add_chat_arguments,
    add_compare_arguments,
    add_config_arguments,
    add_env_arguments,
    add_init_arguments,
    add_merge_arguments,
    nearest_command,
    normalise,
)
from megarl.completion import add_arguments as add_completion_arguments
from megarl.completion import complete
from megarl.errors import ToldByRankZeroError, UserError
from megarl.files import as_user_error
from megarl.jobs import JOBS, Job
from megarl.terminal import one_line, working

if TYPE_CHECKING:
    from megarl.config.evaluate import EvalConfig
    from megarl.config.training import TrainingRoot


_DESCRIPTION = "Post-train language models on Megatron-Core and vLLM."
_EXAMPLES = """\
examples:
{jobs}
  megarl convert hf-to-megatron models/smollm2-135m-instruct checkpoints/smollm2 --verify
  megarl plan --config configs/plan_qwen3_30b_a3b.yaml --gpus 32
  megarl data inspect configs/quickstart_sft.yaml -n 5
  megarl env try configs/quickstart_grpo.yaml --answer 42
  megarl report runs/quickstart
  megarl compare runs/quickstart runs/mine
  echo "1 + 2 + 3 =" | megarl chat runs/quickstart
  megarl init grpo --model models/smollm2-135m-instruct --data configs/data/sums.jsonl
  megarl recipes cp grpo_math_jsonl my.yaml
  megarl doctor

docs/configuration.md describes every setting. The same command run again resumes its run."""
_JOB_EPILOG = """\
overrides:
  section.key=value overrides any setting of the file; lists and mappings are YAML:
    optimizer.lr=1e-5  logging.wandb=null  data.train.arguments.min_terms=3
    'data.held_out={{source: jsonl, path: data/test.jsonl}}'"""
_TRAINING_EPILOG = """

several trainer processes:
  parallel.num_processes=N starts N on this machine. Under torchrun or srun each rank runs this same command:
    torchrun --nproc-per-node 8 -m megarl {job} --config FILE
    srun --ntasks-per-node 8 megarl {job} --config FILE"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    options = _parse(arguments)
    try:
        match options.command:
            case "report":
                return _report(options)
            case "convert":
                from megarl.convert.cli import run

                return run(options)
            case "plan":
                from megarl.simulate.cli import run as plan

                return plan(options)
            case "data":
                with working("loading the tokenizer's libraries"):
                    from megarl.loops.inspect_data import run as inspect

                return inspect(options)
            case "env":
                with working("loading the libraries of data and environments"):
                    from megarl.loops.try_environment import run as try_environment

                return try_environment(options)
            case "compare":
                from megarl.metrics.compare import run as compare

                return compare(options)
            case "init":
                from megarl.init import run as init

                return init(options)
            case "chat":
                from megarl.config.hub import argument_directory

                argument_directory(options.model, "RUN_OR_MODEL")
                with working("loading torch and the engine's libraries"):
                    from megarl.loops.chat import run as chat

                return chat(options)
            case "merge":
                from megarl.convert.cli import run_merge as merge

                return merge(options)
            case "completion":
                from megarl.completion import run as completion

                return completion(options)
            case "config":
                from megarl.config.explain import run as explain

                return explain(options)
            case "recipes":
                from megarl.recipes import run as recipes

                return recipes(options)
            case "push":
                from megarl.push import run as push

                return push(options)
            case "doctor":
                from megarl.doctor import main as doctor

                return doctor()
            case _:
                return _run_job(options, arguments)
    except ToldByRankZeroError:
        return 2
    except UserError as error:
        _print_error(error)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # its reader has seen enough, `| head` say
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit
        return 141
    except OSError as error:
        if (mendable := as_user_error(error)) is None:
            raise
        _print_error(mendable)
        return 2


def make_parsers() -> tuple[
    argparse.ArgumentParser, Mapping[str, argparse.ArgumentParser], Mapping[str, argparse.ArgumentParser]
]:
    """Return the parser, the commands' parsers, and the commands that take key=value settings."""
    raw = argparse.RawDescriptionHelpFormatter
    examples = "\n".join(f"  megarl {job.name} --config {job.example}" for job in JOBS.values())
    parser = argparse.ArgumentParser(
        prog="megarl",
        description=_DESCRIPTION,
        epilog=_EXAMPLES.format(jobs=examples),
        formatter_class=raw,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"megarl {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="command")
    with_overrides = {}
    for job in JOBS.values():
        with_overrides[job.name] = command = commands.add_parser(
            job.name,
            help=job.help,
            description=job.help[0].upper() + job.help[1:] + ".",
            epilog=(_JOB_EPILOG + (_TRAINING_EPILOG if job.trains else "")).format(job=job.name),
            formatter_class=raw,
            allow_abbrev=False,
        )
        command.add_argument(
            "-c",
            "--config",
            metavar="FILE",
            help="YAML configuration; optional if key=value sets all that is required",
        )
        command.add_argument(
            "--dry-run",
            choices=("summary", "full"),
            nargs="?",
            const="summary",
            help="read model, data and environments, say what would happen, and stop; =full prints YAML",
        )
        said = command.add_mutually_exclusive_group()
        said.add_argument("-q", "--quiet", action="store_true", help="print warnings and errors only")
        said.add_argument(
            "-v", "--verbose", action="store_true", help="print details, and other libraries' warnings"
        )
        command.add_argument(
            "overrides", nargs="*", metavar="key=value", help="settings that override the file"
        )
    report = commands.add_parser(
        "report", help="write or update the HTML report of a run", allow_abbrev=False
    )
    report.add_argument(
        "run_dirs",
        type=Path,
        nargs="+",
        metavar="RUN_DIR",
        help="run directory, e.g. runs/quickstart; with several, the others' curves beside the first's",
    )
    report.add_argument(
        "--serve", action="store_true", help="follow the run: serve a page on 127.0.0.1 that refreshes itself"
    )
    report.add_argument(
        "--port", type=int, default=0, metavar="N", help="port of --serve (default: any free one)"
    )
    from megarl.convert.cli import add_arguments

    text = "convert or inspect Hugging Face and Megatron checkpoints"
    add_arguments(commands.add_parser("convert", help=text, description=text, allow_abbrev=False))
    from megarl.simulate.cli import add_arguments as add_plan_arguments

    text = "estimate GPU memory and weight-sync volume of a layout; needs no GPU"
    with_overrides["plan"] = commands.add_parser("plan", help=text, description=text, allow_abbrev=False)
    add_plan_arguments(with_overrides["plan"])
    text = "preview tokenised examples and loss masks of a run's data"
    with_overrides["data"] = commands.add_parser("data", help=text, description=text, allow_abbrev=False)
    _add_data_arguments(with_overrides["data"])
    text = "try an environment on an answer, without training"
    with_overrides["env"] = commands.add_parser("env", help=text, description=text, allow_abbrev=False)
    add_env_arguments(with_overrides["env"])
    from megarl.push import add_arguments as add_push_arguments
    from megarl.recipes import add_arguments as add_recipes_arguments

    for name, text, add in (
        ("compare", "configuration, metrics and paired differences of runs", add_compare_arguments),
        ("chat", "talk to a model through an engine; questions on standard input", add_chat_arguments),
        ("merge", "write a LoRA adapter and its base model as one model", add_merge_arguments),
        ("completion", "completion of commands and settings in a shell", add_completion_arguments),
        ("config", "explain a setting: type, default, meaning, which commands have it", add_config_arguments),
        ("init", "write a first configuration of a job; asks for what is not given", add_init_arguments),
        ("recipes", "list, show or copy the configurations that come with MegaRL", add_recipes_arguments),
        ("push", "upload what a run has exported to the Hugging Face Hub", add_push_arguments),
    ):
        add(commands.add_parser(name, help=text, description=text, allow_abbrev=False))
    commands.add_parser("doctor", help="check hardware, packages and native ops", allow_abbrev=False)

    return parser, commands.choices, with_overrides


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser, commands, with_overrides = make_parsers()
    complete(parser, with_overrides)
    if not arguments:
        parser.print_help()
        raise SystemExit(0)
    if arguments[0] in ("help", "version"):  # options in some tools, commands in others
        arguments = ["--version"] if arguments[0] == "version" else [*arguments[1:2], "--help"]
    if not arguments[0].startswith("-") and arguments[0] not in commands:
        near = nearest_command(arguments[0], commands)
        parser.error(
            f"there is no command {arguments[0]!r}; "
            + (f"did you mean {near}?" if near else f"commands: {', '.join(commands)}")
        )
    if arguments[0] in ("data", "env"):  # their CONFIG is positional: drop the option's name
        arguments = [each for each in arguments if each not in ("-c", "--config")]
    elif arguments[0] in with_overrides:
        arguments = [arguments[0], *normalise(arguments[1:])]
    options, rest = parser.parse_known_args(arguments)
    # argparse takes one block of positional arguments; overrides may stand on both sides of an option.
    strangers = [text for text in rest if text.startswith("-")] if options.command in with_overrides else rest
    if strangers:
        commands.get(options.command, parser).error(f"unrecognized arguments: {' '.join(strangers)}")
    if options.command in with_overrides:
        options.overrides += rest
    return options


def _add_data_arguments(parser: argparse.ArgumentParser) -> None:
    command = parser.add_subparsers(dest="data_command", required=True, metavar="inspect").add_parser(
        "inspect", help="show examples as token ids and loss masks of the run, decoded", allow_abbrev=False
    )
    command.add_argument("config", metavar="CONFIG", help="YAML configuration of a run")
    command.add_argument("-n", type=int, default=3, metavar="N", help="examples to show (default 3)")
    command.add_argument("--split", choices=["train", "held_out"], default="train", help="default: train")
    command.add_argument(
        "--for",
        dest="job",
        choices=list(JOBS),
        help="job of the configuration; default: inferred from its sections",
    )
    command.add_argument("overrides", nargs="*", metavar="key=value", help="settings that override the file")


def _run_job(options: argparse.Namespace, arguments: Sequence[str]) -> int:
    from megarl.cluster.limits import choose_temp_dir
    from megarl.launch import adopt_slurm, run_ranks, run_ranks_on_ray, world_size
    from megarl.run_directory import RunDirectory

    job = JOBS[options.command]
    if options.config is None and not options.overrides:
        raise UserError(
            f"megarl {job.name}: no configuration: give FILE.yaml or settings as key=value; `megarl init "
            f"{job.name}` writes a first file, `megarl recipes ls` lists those that come with MegaRL"
        )
    if (note := choose_temp_dir(os.environ)) is not None and _rank() == 0:
        print(f"note: {one_line(note)}", file=sys.stderr)
    adopt_slurm(os.environ)
    started = world_size(os.environ)
    try:
        config, from_checkpoint = _read_job(options, job, started)
    except UserError:
        if os.environ.get("LOCAL_RANK", "0") != "0":
            return 2  # every rank finds the same errors; the first of each machine prints them
        raise
    if options.dry_run == "full":
        if _rank() == 0:
            print(_resolved(config), end="")
        return 0
    if options.dry_run:
        if _rank() == 0:
            from megarl.loops.dry_run import dry_run

            with working("checking the machine"):
                problems = _problems_here(job, config, started)
            dry_run(job, config, problems)
        return 0
    source = config.model.path
    if from_checkpoint:
        from megarl.loops.start_weights import with_converted_path

        config = with_converted_path(config)
    if job.trains and (line := RunDirectory(config.run.dir).check_before_start(config)) is not None:
        if _rank() == 0:
            print(line)
        return 0
    if from_checkpoint:
        _convert_start(config, source)
    if job.trains and started is None:
        count, ranks_path = config.parallel.num_processes, Path(config.run.dir) / "ranks"
        if config.launcher == "ray":
            return run_ranks_on_ray(count, arguments, ranks_path)
        if count > 1:
            return run_ranks(count, arguments, ranks_path)
    from megarl.metrics.console import use_level

    use_level("quiet" if options.quiet else "verbose" if options.verbose else "normal")
    _call_loop(job, config)
    return 0


def _read_job(options: argparse.Namespace, job: Job, started: int | None) -> tuple[Any, bool]:
    """Return the configuration, and whether its run starts from a checkpoint.

    Raises:
        UserError: the configuration is wrong; or, unless this is a dry run, the machine cannot run it.
    """
    from megarl.config.load import load_config
    from megarl.config.model import is_checkpoint

    def checking() -> AbstractContextManager[None]:
        return working("checking the configuration") if _rank() == 0 else nullcontext()

    with checking():
        config = load_config(
            job.root(),
            options.config,
            options.overrides,
            num_processes=started if job.trains else None,
        )
    from_checkpoint = job.trains and is_checkpoint(config.model.path)
    if not options.dry_run and getattr(config, "trainer", None) and config.trainer.any_family:
        _fetch_models(config)  # their weights say what the model is
    with checking():
        if job.trains and not from_checkpoint:
            from megarl.models.layout_checks import check_training

            check_training(config)
        if _rank() == 0 and options.dry_run != "full":
            from megarl.loops.lookups import check_names

            check_names(config, here=not options.dry_run)
        if not options.dry_run:  # a dry run may be on another machine than the run
            _check_machine(job, config, started)
    if not options.dry_run:
        _fetch_models(config)
    return config, from_checkpoint


def _fetch_models(config: Any) -> None:
    """Download the weights of models of the hub; ranks started from here take the same commits."""
    from megarl.config import hub

    if (commits := hub.commits(config)) is None:
        return
    hub.fetch_weights(config)
    if _rank() == 0 and hub.COMMITS not in os.environ:
        for path, value in hub.models_in(config):
            if isinstance(value, hub.HubDirectory):
                print(f"{'.'.join(path)}: {value.written} is {value}", flush=True)
    os.environ[hub.COMMITS] = commits


def _problems_here(job: Job, config: Any, started: int | None) -> list[str]:
    """Return a line per reason why this machine could not run it; a dry run may be on another."""
    try:
        _check_machine(job, config, started)
    except UserError as error:
        return [f"this one cannot run it: {line}" for line in str(error).splitlines()]
    return []


def _convert_start(config: TrainingRoot, source: str) -> None:
    """Convert the checkpoint ``source`` to ``config.model.path`` on rank 0, or wait for it; then check it."""
    from megarl.loops.start_weights import convert_start, wait_for_start
    from megarl.models.layout_checks import check_training

    if _rank() == 0:
        if (line := convert_start(source, config.run.dir, keep=True)) is not None:
            print(one_line(line))
    else:
        wait_for_start(source, config.run.dir, config.run.hang_timeout_seconds)
    check_training(config)


def _check_machine(job: Job, config: Any, started: int | None) -> None:
    """Raise UserError for what this machine cannot run, with ``started`` ranks of a launcher or locally.

    Ray's ranks may be on other machines: they check for themselves.
    """
    here = not job.trains or started is not None or config.launcher != "ray"
    if here and job.trains:
        from megarl.platform.packages import check_packages

        check_packages(config.parallel)
    _check_memory_can_be_mapped(config)
    if here:
        from megarl.cluster.limits import check_limits

        check_limits()
        _check_shared_memory(config)
        from megarl.cluster.devices import check_devices

        alone = config.parallel.num_processes if job.trains and started is None else 1
        check_devices(int(os.environ.get("LOCAL_WORLD_SIZE", alone)))


def _check_shared_memory(config: Any) -> None:
    """Raise UserError if /dev/shm cannot hold weights that trainer and engine share on a CPU."""
    from megarl.config.model import is_checkpoint

    path, rollout = config.model.path, getattr(config, "rollout", None)
    if rollout is None or is_checkpoint(path):
        return
    from megarl.cluster.limits import check_shared_memory
    from megarl.models import load_architecture

    shapes = load_architecture(path, any_family=True).hf_shapes().values()
    width = 2 if config.model.dtype == "bfloat16" else 4
    try:
        check_shared_memory(width * sum(math.prod(shape) for shape in shapes))
    except UserError:
        from megarl.platform import chosen_name  # imports torch, which is not needed where there is room

        if chosen_name() == "cpu":
            raise


def _check_memory_can_be_mapped(config: TrainingRoot | EvalConfig) -> None:
    """Raise UserError if an engine on the trainer's GPU could not map its weights."""
    from megarl.cluster.variables import expandable_segments

    weights = getattr(config, "weights", None)
    asked = hasattr(config, "rollout") and (weights is None or weights.transport != "peer")
    if not asked or expandable_segments(os.environ) is None:  # avoids importing torch
        return
    from megarl.platform import chosen_name
    from megarl.weights.cuda_ipc import check_allocator

    if chosen_name() == "cuda":
        check_allocator()


def _call_loop(job: Job, config: TrainingRoot | EvalConfig) -> None:
    from megarl.foreign_output import quieten, quieten_bars
    from megarl.metrics.console import Console
    from megarl.opening import opening

    console = Console(job.name, enabled=_rank() == 0)
    console.note(opening(job, config))
    if not console.is_verbose:
        quieten(os.environ)
    with console.waiting("loading libraries"):
        loop = job.loop()
    if not console.is_verbose:
        quieten_bars()
    loop(config)


def _resolved(config: TrainingRoot | EvalConfig) -> str:
    from megarl.config.load import dump_config
    from megarl.config.model import is_checkpoint, read_model_config

    path = config.model.path
    facts = config.describe(None if is_checkpoint(path) else read_model_config(path))
    return "".join(f"# {line}\n" for line in facts) + dump_config(config)


def _report(options: argparse.Namespace) -> int:
    run_dirs = options.run_dirs
    for run_dir in run_dirs:
        if options.serve and not run_dir.is_dir():
            raise UserError(f"{run_dir}: no such run directory")
        if not options.serve and not (run_dir / "metrics.jsonl").is_file():
            raise UserError(f"{run_dir}: not a run directory (no metrics.jsonl in it)")
    if options.serve:
        from megarl.metrics.report_server import ReportServer

        with ReportServer(run_dirs, options.port) as server:
            names = ", ".join(map(str, run_dirs))
            print(f"Serving {names} at {server.url} (Ctrl-C ends it; the run goes on)", flush=True)
            server.serve_forever()
    from megarl.metrics.report import write_comparison, write_report

    print(write_comparison(run_dirs) if len(run_dirs) > 1 else write_report(run_dirs[0]))
    return 0


def _print_error(error: UserError) -> None:
    """Print one line per violation, with a prefix that can be searched for in a log."""
    rank = _rank()
    prefix = "error" if rank == 0 else f"error (rank {rank})"
    for line in str(error).splitlines():
        print(f"{prefix}: {one_line(line)}", file=sys.stderr)


def _rank() -> int:
    text = os.environ.get("RANK", "0")
    return int(text) if text.isascii() and text.isdigit() else 0  # another one is refused


if __name__ == "__main__":
    sys.exit(main())
