"""Command lines as people write them, turned into the one form that the parser reads; parsers of commands
whose modules are heavy.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Collection, Sequence
from difflib import get_close_matches
from pathlib import Path

from megarl.dtypes import full_dtype
from megarl.jobs import JOBS, PROBLEMS

_SETTING = re.compile(r"--?([a-z][\w-]*(?:\.[\w-]+)+)(=.*)?", re.DOTALL)
_FILE = re.compile(r"[^=]+\.ya?ml", re.IGNORECASE)


_TRAINING = ", ".join(job.name for job in JOBS.values() if job.trains)
_ELSEWHERE = {
    **dict.fromkeys(("train", "run", "start", "finetune", "fit", "rl"), f"one of {_TRAINING}"),
    **dict.fromkeys(("list", "ls", "examples", "cp"), "recipes ls"),
    **dict.fromkeys(("inference", "generate", "serve", "interactive"), "chat"),
    **dict.fromkeys(("download", "login"), "a job with model.path=org/name, which downloads it"),
    **dict.fromkeys(("env-info", "info", "check"), "doctor"),
    **dict.fromkeys(("validate", "lint"), "a job with --dry-run"),
    "upload": "push",
    "export": "convert",
}
"""Commands of other tools -> what does the same here."""


def nearest_command(name: str, commands: Collection[str]) -> str | None:
    """The command that was meant, None where nothing comes near."""
    if name.lower() in _ELSEWHERE:
        return _ELSEWHERE[name.lower()]
    near = get_close_matches(name.lower(), commands, n=1, cutoff=0.5)
    return near[0] if near else None


def normalise(arguments: Sequence[str]) -> list[str]:
    """Rewrite ``--section.key=value`` and ``--section.key value`` as overrides, a YAML file as --config.

    >>> normalise(["run.yaml", "--optimizer.lr", "1e-4", "--run.seed=2"])
    ['--config', 'run.yaml', 'optimizer.lr=1e-4', 'run.seed=2']
    """
    result: list[str] = []
    rest = list(arguments)
    named = any(each in ("-c", "--config") or each.startswith(("--config=", "-c=")) for each in rest)
    while rest:
        each = rest.pop(0)
        if each == "--dry-run":  # the parser would take the next word for its value
            result.append("--dry-run=summary")
        elif each in ("-c", "--config"):
            result += [each, *rest[:1]]
            rest = rest[1:]
        elif (setting := _SETTING.fullmatch(each)) is not None:
            key = setting[1].replace("-", "_")
            if setting[2] is not None:
                result.append(key + setting[2])
            elif rest and not rest[0].startswith("--"):
                result.append(f"{key}={rest.pop(0)}")
            else:
                result.append(each)  # has no value: the parser refuses it by its name
        elif not named and _FILE.fullmatch(each):
            named = True
            result += ["--config", each]
        else:
            result.append(each)
    return result


def add_env_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `megarl env`."""
    command = parser.add_subparsers(dest="env_command", required=True, metavar="try").add_parser(
        "try", help="run one episode on a given answer: prompt, reward and its parts", allow_abbrev=False
    )
    command.add_argument("config", metavar="CONFIG", help="YAML configuration of a run with an environment")
    command.add_argument(
        "--problem", type=int, default=0, metavar="N", help="problem of the data (default 0)"
    )
    command.add_argument("--split", choices=["train", "held_out"], help="default: train where there is one")
    command.add_argument(
        "--answer",
        action="append",
        metavar="TEXT",
        help="the response; once per turn for an environment of several. Default: standard input",
    )
    command.add_argument(
        "--for",
        dest="job",
        choices=[job.name for job in JOBS.values() if job.data is PROBLEMS],
        help="job of the configuration; default: inferred from its sections",
    )
    command.add_argument("--reference", action="store_true", help="answer with the reference answer")
    command.add_argument("--json", action="store_true", help="print the episode as JSON")
    command.add_argument("overrides", nargs="*", metavar="key=value", help="settings that override the file")


def add_compare_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `megarl compare`."""
    parser.add_argument(
        "runs", nargs="+", type=Path, metavar="RUN_DIR", help="two or more; the first is compared with"
    )
    parser.add_argument(
        "--metric", action="append", metavar="NAME", help="a metric of metrics.jsonl; may be repeated"
    )
    parser.add_argument("--json", action="store_true", help="print all figures as JSON")


def add_merge_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `megarl merge`."""
    parser.add_argument(
        "source", metavar="RUN_OR_ADAPTER", help="run directory, adapter, or an adapter's hub id"
    )
    parser.add_argument("target", type=Path, metavar="TARGET", help="the Hugging Face directory to write")
    parser.add_argument(
        "--base", metavar="DIR", help="base model's directory or hub id; default: as the adapter says"
    )
    parser.add_argument(
        "--dtype",
        type=full_dtype,
        choices=("float32", "bfloat16", "float16"),
        help="convert to this dtype (fp32, bf16 and fp16 are short for them)",
    )
    parser.add_argument("--max-shard-size", default="2GiB", metavar="SIZE", help="of a file (default 2GiB)")
    parser.add_argument("--overwrite", action="store_true", help="replace TARGET if it exists")


def add_chat_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `megarl chat`."""
    parser.add_argument(
        "model", metavar="RUN_OR_MODEL", help="run directory, checkpoint, model directory or id of the hub"
    )
    parser.add_argument("--system", metavar="TEXT", help="system message")
    parser.add_argument("--max-new-tokens", type=int, default=512, metavar="N", help="default 512")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T", help="default 0: greedy")
    parser.add_argument("--top-p", type=float, default=1.0, metavar="P", help="default 1")
    parser.add_argument("--seed", type=int, default=1, metavar="N", help="default 1")
    parser.add_argument("--json", action="store_true", help="a JSON object per answer")
    engine = parser.add_argument_group("engine")
    engine.add_argument("--backend", choices=("vllm", "hf"), default="vllm", help="default vllm")
    engine.add_argument(
        "--dtype",
        type=full_dtype,
        choices=("float32", "bfloat16"),
        default="float32",
        help="default float32; bf16 is short for bfloat16",
    )
    engine.add_argument("--kv-cache-gib", type=float, default=0.5, metavar="GIB", help="default 0.5")
    engine.add_argument(
        "--max-model-len", type=int, default=4096, metavar="N", help="tokens of a conversation (default 4096)"
    )


def add_init_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `megarl init`."""
    parser.add_argument("job", nargs="?", choices=list(JOBS), help="what to run")
    parser.add_argument("--model", metavar="DIR", help="Hugging Face directory, or an id of the hub")
    parser.add_argument(
        "--data",
        metavar="DATA",
        help="file of rows, dataset of the hub (org/name), or task of reasoning-gym",
    )
    parser.add_argument("--teacher", metavar="DIR", help="the teacher's directory or id (distill)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="file to write (default: JOB.yaml)")


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `megarl config`."""
    parser.add_argument("key", metavar="SECTION.KEY", help="e.g. optimizer.lr; a section lists its keys")
    parser.add_argument("--for", dest="job", metavar="COMMAND", help="of this command alone")
