"""Arguments of `megarl convert`."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

from megarl.dtypes import full_dtype
from megarl.errors import UserError
from megarl.terminal import printable, working

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the three subcommands and their options."""
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="what")
    for kind, text in (
        ("hf-to-megatron", "write a Megatron-LM distributed checkpoint of a Hugging Face directory"),
        ("megatron-to-hf", "write a Hugging Face directory of a Megatron-LM or MegaRL checkpoint"),
        ("hf-to-torch", "write a checkpoint of trainer.backend torch of a Hugging Face directory"),
        ("torch-to-hf", "write a Hugging Face directory of a checkpoint of trainer.backend torch"),
    ):
        command = kinds.add_parser(kind, help=text, description=text, allow_abbrev=False)
        what = "directory or hub id, org/name[@revision]" if kind.startswith("hf") else "checkpoint"
        command.add_argument("source", metavar="SOURCE", help=what)
        command.add_argument("target", type=Path, metavar="TARGET")
        command.add_argument(
            "--dtype",
            type=full_dtype,
            choices=("float32", "bfloat16", "float16"),
            help="convert to this dtype (fp32, bf16 and fp16 are short for them)",
        )
        command.add_argument(
            "--max-shard-size",
            default="2GiB",
            metavar="SIZE",
            help="maximum file size, which bounds memory use (default 2GiB)",
        )
        command.add_argument("--overwrite", action="store_true", help="replace TARGET if it exists")
        if "megatron" in kind:
            command.add_argument(
                "--verify", action="store_true", help="compare both sides' logits on random tokens afterwards"
            )
        if kind == "hf-to-megatron":
            command.add_argument(
                "--mtp",
                choices=("ignore", "keep"),
                default="ignore",
                help="layers of multi-token prediction, which the model does not use: drop them (ignore), or "
                "store them for the conversion back (keep)",
            )
        if kind.endswith("-to-hf"):
            command.add_argument(
                "--hf-config", metavar="DIR", help="directory or hub id with config.json and the tokenizer"
            )
    inspect = kinds.add_parser("inspect", help="list the tensors of a checkpoint", allow_abbrev=False)
    inspect.add_argument("source", type=Path, metavar="DIR")
    inspect.add_argument("--json", action="store_true", help="as JSON")


def run(options: argparse.Namespace) -> int:
    """Run one subcommand; raise UserError for errors the user can fix."""
    _check(options)
    with working("loading torch"):
        from megarl.convert import check, commands

    if options.kind == "inspect":
        print(check.inspect(options.source, as_json=options.json))
        return 0
    settings = {
        "dtype": options.dtype,
        "max_bytes": parse_size(options.max_shard_size),
        "overwrite": options.overwrite,
    }
    if "torch" in options.kind:
        _run_torch(options, settings)
        return 0
    if options.verify:
        check.require_model(options.source, getattr(options, "hf_config", None))
    if options.kind == "hf-to-megatron":
        keep_mtp = options.mtp == "keep"
        commands.hf_to_megatron(options.source, options.target, keep_mtp=keep_mtp, **settings)
        sides = options.target, options.source
    else:
        commands.megatron_to_hf(options.source, options.target, hf_config=options.hf_config, **settings)
        sides = options.source, options.target
    print(printable(f"wrote {options.target}"))
    if options.verify:
        difference = check.verify(*sides, getattr(options, "hf_config", None))
        print(f"verified: logits differ by at most {difference:.1e}")
    return 0


def _check(options: argparse.Namespace) -> None:
    """Replace names of directories by paths, hub ids by snapshots; UserError for what is not there."""
    from megarl.config.hub import argument_directory
    from megarl.convert.sources import check_target, checkpoint_directory, model_directory

    if options.kind == "inspect":
        argument_directory(str(options.source), "DIR")
        return
    parse_size(options.max_shard_size)
    find = model_directory if options.kind.startswith("hf-") else checkpoint_directory
    check_target(options.target, options.overwrite)
    options.source = find(options.source, "SOURCE")
    if getattr(options, "hf_config", None) is not None:
        options.hf_config = Path(argument_directory(options.hf_config, "--hf-config"))


def run_merge(options: argparse.Namespace) -> int:
    """Run `megarl merge`."""
    from megarl.convert.sources import adapter_directory, check_target, model_directory

    size = parse_size(options.max_shard_size)
    check_target(options.target, options.overwrite)
    source = adapter_directory(options.source, "RUN_OR_ADAPTER")
    base = None if options.base is None else model_directory(options.base, "--base")
    with working("loading torch"):
        from megarl.convert.merge import merge

    merge(source, options.target, base=base, dtype=options.dtype, max_bytes=size, overwrite=options.overwrite)
    print(printable(f"wrote {options.target}"))
    return 0


def _run_torch(options: argparse.Namespace, settings: dict[str, Any]) -> None:
    from megarl.convert.torch_native import hf_to_torch, torch_to_hf

    if options.kind == "hf-to-torch":
        hf_to_torch(options.source, options.target, **settings)
    else:
        torch_to_hf(options.source, options.target, hf_config=options.hf_config, **settings)
    print(printable(f"wrote {options.target}"))


def parse_size(text: str) -> int:
    """Parse a size such as "500MB", "2GiB" or "1000" into bytes."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?I?B)?", text.strip().upper())
    if match is None or (match[2] or "") not in {*_UNITS, "B"} or float(match[1]) <= 0:
        raise UserError(f"--max-shard-size: {text!r} is not a size such as 500MB or 2GiB")
    return int(float(match[1]) * _UNITS.get("" if match[2] == "B" else match[2] or "", 1))
