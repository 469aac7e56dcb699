"""reasoning-gym tasks by name and arguments, with errors that name the configuration field.

In nearly every reasoning-gym task, problem i of a dataset with seed s is drawn from the random stream ``s +
i``. Datasets whose seeds differ by less than their size share problems: seed 2 is seed 1 from its second
problem on. A rule of the data section rejects that for held-out data.
"""

from __future__ import annotations

import dataclasses
import difflib
from typing import TYPE_CHECKING, Any

from megarl.errors import UserError

if TYPE_CHECKING:
    from reasoning_gym.dataset import ProceduralDataset

    from megarl.config.data import ReasoningGymSource

# Settings of the source, not allowed in `arguments`.
_RESERVED = ("seed", "size")


def make_dataset(source: ReasoningGymSource, field: str) -> ProceduralDataset:
    """Create the reasoning-gym dataset of ``source``; problems are generated on access.

    Args:
        source: the task, its arguments, size and seed.
        field: the configuration key of ``source``, e.g. ``data.train``, for error messages.

    Raises:
        UserError: an unknown task (with the nearest names), or an unknown or invalid argument.
    """
    import reasoning_gym
    from reasoning_gym.factory import DATASETS

    if source.task not in DATASETS:
        near = difflib.get_close_matches(source.task, DATASETS, n=3, cutoff=0.4)
        hint = f"did you mean {', '.join(near)}?" if near else f"there are {len(DATASETS)}, e.g. chain_sum"
        raise UserError(f"{field}.task: reasoning-gym has no task {source.task!r}; {hint}")
    config_class = DATASETS[source.task][1]
    known = [f.name for f in dataclasses.fields(config_class) if f.init and f.name not in _RESERVED]
    for name in source.arguments:
        if name in _RESERVED:
            raise UserError(f"{field}.arguments.{name}: set {field}.{name} instead")
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"it has {', '.join(known)}"
            raise UserError(f"{field}.arguments.{name}: task {source.task} has no such argument; {hint}")
    try:
        dataset = reasoning_gym.create_dataset(
            source.task, seed=source.seed, size=source.size, **source.arguments
        )
    except Exception as error:  # the package raises AssertionError, TypeError, ValueError and others
        raise UserError(
            f"{_blame(source, field)}: task {source.task} refuses it: {_reason(error)}"
        ) from error
    try:
        # Wrong types pass the checks of many tasks and only fail when a problem is generated.
        dataset[0]
    except Exception as error:
        raise UserError(
            f"{_blame(source, field)}: task {source.task} cannot generate a problem: {_reason(error)}"
        ) from error
    return dataset


def _blame(source: ReasoningGymSource, field: str) -> str:
    """Return the argument at fault, found by omitting each in turn, or all of them."""
    import reasoning_gym

    for name in source.arguments:
        rest = {key: value for key, value in source.arguments.items() if key != name}
        try:
            reasoning_gym.create_dataset(source.task, seed=source.seed, size=source.size, **rest)[0]
        except Exception:  # still fails: another argument is at fault
            continue
        return f"{field}.arguments.{name} = {source.arguments[name]!r}"
    return f"{field}.arguments"


def _reason(error: Exception) -> str:
    text: Any = str(error).splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__
