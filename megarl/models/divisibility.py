"""Find tensors of an architecture that a layout cannot split."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import Literal

from megarl.errors import UserError
from megarl.layout import ParallelLayout
from megarl.models.table import Architecture, Slot

Side = Literal["trainer", "engine"]
_AT = "@"  # placeholder for the tensor's name, so that equal messages can be merged


def division_problems(
    architecture: Architecture, side: Side, layout: ParallelLayout, prefix: str
) -> Iterator[str]:
    """Yield one line per reason why tensors cannot be split over tensor or expert-tensor ranks.

    Lines begin with the field at fault, in section ``prefix``.
    """
    names: dict[tuple[str, str], list[str]] = defaultdict(list)
    for rule in architecture.rules:
        for place in rule.trainer if side == "trainer" else rule.engine:
            if place.dim is None or place.padded:
                continue
            kind = "expert_tensor" if place.expert else "tensor"
            ranks = layout.expert_tensor if place.expert else layout.tensor
            slot = place.slots[place.slot] if place.slots else Slot(rule.shape[place.dim])
            if (message := _span_problem(slot, ranks, side)) is not None:
                names[kind, message].append(rule.hf.format(layer="*", expert="*"))
    for (kind, message), tensors in names.items():
        field = "tensor" if side == "engine" else kind
        listed = ", ".join(tensors[:2]) + (f" and {len(tensors) - 2} more" if len(tensors) > 2 else "")
        yield f"{prefix}.{field}_parallel_size: {message} ({listed})"


def _span_problem(slot: Slot, ranks: int, side: Side) -> str | None:
    try:
        slot.span(0, ranks, _AT)
    except UserError as error:
        return str(error).removeprefix(f"{_AT}: ")
    units = slot.size // slot.unit
    if side == "trainer" and units < ranks:
        # An engine replicates them. The trainer's replicas would each get a part of the gradient, which is
        # not summed.
        return (
            f"{ranks} tensor ranks need {ranks} units of {slot.unit} (got {units}): the trainer repeats none"
        )
    return None
