"""Regions that map parameters of transformers' models to tensors of Hugging Face checkpoints.

A parameter usually has the name of its tensor. If transformers fuses several tensors in one parameter (the
experts of a layer), its conversion mapping describes how; only stacking and concatenation are supported,
since their parts are regions of the parameter.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

from megarl.errors import UserError
from megarl.models.table import Box, Index, Region


def transformers_regions(
    lm: Any, shapes: Mapping[str, tuple[int, ...]], names: Collection[str] | None
) -> list[Region]:
    """Return the regions of checkpoint tensors in parameters with these full ``shapes``.

    ``names`` are those of a checkpoint; None: those that transformers would write.

    Raises:
        UserError: a parameter is built from tensors in another way.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming

    conversions = get_model_conversion_mapping(lm, add_legacy=False)
    converters = [each for each in conversions if isinstance(each, WeightConverter)]
    renamings = [each for each in conversions if type(each) is WeightRenaming]
    found: list[Region] = []
    for param, shape in shapes.items():
        whole = tuple((0, size) for size in shape)
        if names is not None and param in names:
            found.append(Region(param, whole, param, whole))
            continue
        for name, box, index in _sources(param, shape, converters):
            old = _old_name(name, renamings)
            found.append(Region(old if names is None or old in names else name, box, param, index))
    return found


def _sources(param: str, shape: tuple[int, ...], converters: list[Any]) -> list[tuple[str, Box, Index]]:
    """Return name, box and index in ``param`` of each of its tensors."""
    from transformers.core_model_loading import Concatenate, MergeModulelist

    whole = tuple((0, size) for size in shape)
    for converter in converters:
        target = converter.target_patterns[0]
        if len(converter.target_patterns) > 1 or not re.search(re.escape(target) + "$", param):
            continue
        kinds = [type(operation) for operation in converter.operations]
        if kinds not in ([MergeModulelist], [MergeModulelist, Concatenate], [Concatenate]):
            how = ", ".join(kind.__name__ for kind in kinds)
            raise UserError(f"model.path: transformers makes {param} by {how}, which is not supported")
        stacked = kinds[0] is MergeModulelist
        dim = converter.operations[-1].dim if kinds[-1] is Concatenate else len(shape) - 1
        sources = [re.sub(r"\\(.)", r"\1", each).removeprefix("^") for each in converter.source_patterns]
        each, parts = shape[dim] // len(sources), []
        for number, source in enumerate(sources):
            index: list[Any] = list(whole)
            index[dim] = (number * each, (number + 1) * each)
            for expert in range(shape[0]) if stacked else (0,):
                name = param[: -len(target)] + source.replace("*", str(expert))
                sizes = [entry[1] - entry[0] for entry in (index[1:] if stacked else index)]
                box = tuple((0, size) for size in sizes)
                parts.append((name, box, (expert, *index[1:]) if stacked else tuple(index)))
        return parts
    return [(param, whole, whole)]


def _old_name(name: str, renamings: list[Any]) -> str:
    """Return the checkpoint's name of a tensor whose module transformers has renamed."""
    for renaming in reversed(renamings):
        name = renaming.reverse_transform().rename_source_key(name)[0]
    return name
