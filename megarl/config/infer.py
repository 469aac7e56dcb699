"""Load a configuration without being told its job."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megarl.config.load import load_config
from megarl.errors import UserError
from megarl.jobs import JOBS, Job


def load_inferred(
    path: str, overrides: Sequence[str], candidates: Sequence[Job], named: str | None = None, **options: Any
) -> tuple[list[Job], Any]:
    """Return the jobs among ``candidates`` that accept the file, and the first one's configuration.

    ``named``, of the option --for, leaves only that job. ``options`` are those of
    :func:`megarl.config.load.load_config`.

    Raises:
        UserError: none accepts it; the violations are those of the job with the fewest.
    """
    if named is not None:
        candidates = [JOBS[named]]
    accepted, failures = {}, {}
    for job in candidates:
        try:
            accepted[job.name] = load_config(job.root(), path, overrides, **options)
        except UserError as error:
            failures[job.name] = error
    if accepted:
        return [JOBS[name] for name in accepted], next(iter(accepted.values()))
    nearest = min(failures, key=lambda name: len(str(failures[name]).splitlines()))
    if len(candidates) == 1:
        raise failures[nearest]
    raise UserError(
        f"{failures[nearest]}\n(read as a configuration of megarl {nearest}; --for names another)"
    )
