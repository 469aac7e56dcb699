"""`megarl push`: upload what a run has exported to the Hugging Face Hub."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from megarl.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `megarl push`."""
    parser.add_argument(
        "run_dir", type=Path, metavar="RUN", help="run directory, or a directory it has exported"
    )
    parser.add_argument(
        "repository", metavar="org/name", help="repository on the hub; made if it is not there"
    )
    parser.add_argument("--adapter", action="store_true", help="upload <RUN>/adapter instead of <RUN>/hf")
    parser.add_argument("--private", action="store_true", help="make the repository private, if it is made")
    parser.add_argument("--revision", metavar="BRANCH", help="branch to commit to; default: main")
    parser.add_argument("--dry-run", action="store_true", help="list what would be uploaded; needs no hub")


def run(options: argparse.Namespace) -> int:
    """Run `megarl push`.

    Raises:
        UserError: there is no export, the repository's name is none, or the hub refuses.
    """
    from megarl.config.hub import is_model_id

    if not is_model_id(options.repository) or "@" in options.repository:
        raise UserError(f"megarl push: a repository is named org/name (got {options.repository!r})")
    directory = exported(options.run_dir, adapter=options.adapter)
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    width = max(len(str(path.relative_to(directory))) for path in files)
    total = 0
    for path in files:
        total += (size := path.stat().st_size)
        print(f"{path.relative_to(directory)!s:{width}}  {_size(size)}")
    where = options.repository + (f"@{options.revision}" if options.revision else "")
    print(f"{len(files)} files, {_size(total)}: {directory} -> {where}", flush=True)
    if options.dry_run:
        print("dry run: nothing was uploaded")
        return 0
    print(_upload(directory, options))
    return 0


def exported(run_dir: Path, *, adapter: bool) -> Path:
    """Return the exported directory of a run; ``run_dir`` may be one itself.

    Raises:
        UserError: there is none, or it is incomplete.
    """
    if (run_dir / ("adapter_config.json" if adapter else "config.json")).is_file():
        directory = run_dir
    else:
        directory = run_dir / ("adapter" if adapter else "hf")
    if not directory.is_dir():
        other = run_dir / ("hf" if adapter else "adapter")
        hint = f"; {other} is there: {'leave out' if adapter else 'use'} --adapter" if other.is_dir() else ""
        why = "a run exports at its end (checkpoint.export_hf, lora.export)"
        raise UserError(f"megarl push: {directory}: no such directory; {hint.removeprefix('; ') or why}")
    if not any(directory.glob("*.safetensors")):
        raise UserError(f"megarl push: {directory}: no weights (*.safetensors)")
    return directory


def _upload(directory: Path, options: argparse.Namespace) -> str:
    """Upload a directory in one commit; return its address."""
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HfHubHTTPError

    api = HfApi()
    try:
        api.create_repo(options.repository, private=options.private or None, exist_ok=True)
        if options.revision:
            api.create_branch(options.repository, branch=options.revision, exist_ok=True)
        commit: Any = api.upload_folder(
            repo_id=options.repository,
            folder_path=directory,
            revision=options.revision,
            commit_message=f"Upload {directory.name} of {directory.resolve().parent.name}",
        )
    except Exception as error:  # of two HTTP libraries
        if isinstance(error, OSError) and error.errno is not None and not isinstance(error, ConnectionError):
            raise
        status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
        if status in (401, 403):
            reason = "HF_TOKEN may not write there; `hf auth login`, or a token with write access"
        elif constants.is_offline_mode():
            reason = "HF_HUB_OFFLINE is set"
        else:
            reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise UserError(f"megarl push: {constants.ENDPOINT}/{options.repository}: {reason}") from error
    return str(commit.commit_url)


def _size(count: int) -> str:
    """Return bytes in a unit that leaves up to three digits before the point."""
    size = float(count)
    for unit in ("B", "KB", "MB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} GB"
