"""docs/guides/coming-from.md: every key of ours that it names is one, every value one that the key takes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import TypeAdapter, ValidationError

from megarl.config.distill import DistillConfig
from megarl.config.grpo import GrpoConfig
from megarl.config.introspect import sections_of
from megarl.config.ppo import PpoConfig
from megarl.config.preference import DpoConfig
from megarl.config.section import Section
from megarl.config.sft import SftConfig

PAGE = Path(__file__).resolve().parents[2] / "docs" / "guides" / "coming-from.md"
ROOTS: list[type[Section]] = [GrpoConfig, PpoConfig, DpoConfig, SftConfig, DistillConfig]


def named() -> list[str]:
    """What stands in backticks in the columns that are ours, notes included, and has a dot."""
    found = []
    for line in PAGE.read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")] if line.startswith("|") else []
        for cell in cells[1:] if len(cells) == 3 else cells[1:2]:
            found += [each for each in re.findall(r"`([^`]+)`", cell) if "." in each.partition(":")[0]]
    return sorted(set(found))


def annotations(section: type[Section], path: list[str]) -> list[Any]:
    """The annotations of the fields that a path may mean, through every member of a union."""
    field = section.model_fields.get(path[0])
    if field is None:
        return []
    if len(path) == 1:
        return [field.rebuild_annotation()]
    return [each for inner in sections_of(field.annotation) for each in annotations(inner, path[1:])]


def takes(annotation: Any, value: Any) -> bool:
    try:
        TypeAdapter(annotation).validate_python(value)
    except ValidationError:
        return False
    return True


def test_the_page_names_many() -> None:
    assert len(named()) > 120


@pytest.mark.parametrize("name", named())
def test_a_key_of_the_page_is_one(name: str) -> None:
    key, _, value = name.partition(":")
    found = [each for root in ROOTS for each in annotations(root, key.split("."))]
    assert found, f"{key} is no key"
    if value:
        assert any(takes(each, yaml.safe_load(value)) for each in found), f"{key} does not take{value}"


def test_a_wrong_name_is_noticed() -> None:
    assert not [each for root in ROOTS for each in annotations(root, ["algorithm", "clip_ratio_low"])]
    [annotation] = annotations(GrpoConfig, ["algorithm", "objective"])
    assert takes(annotation, "sapo") and not takes(annotation, "ppo")
