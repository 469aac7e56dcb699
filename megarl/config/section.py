"""Base class of configuration sections: typed fields, and rules across them."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Callable, Iterator
from types import FunctionType
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PrivateAttr, field_validator
from pydantic_core import PydanticCustomError

from megarl.config.violation import Path, Violation, show

PositiveInt = Annotated[int, Field(ge=1)]
NonNegativeInt = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
NonNegativeFloat = Annotated[float, Field(ge=0)]
Decay = Annotated[float, Field(ge=0, lt=1)]
Text = Annotated[str, Field(min_length=1)]
MAX_NUMBER = 10**15
"""No field counts or measures more: beyond it floats lose units, and libraries' integers end."""
SAID_ITSELF = "said_itself"
"""Type of a pydantic error whose message is the whole explanation."""


def at_most(limit: int) -> AfterValidator:
    """For ``Annotated``: a bound beyond anything sensible, which descriptions of the field leave out."""

    def check(value: Any) -> Any:
        if value > limit:
            raise PydanticCustomError(SAID_ITSELF, f"expected at most {limit}")
        return value

    return AfterValidator(check)


Seconds = Annotated[float, Field(gt=0), at_most(100_000_000)]
"""Three years at most: longer ones overflow in the clocks of threads and sockets."""
Seed = Annotated[int, Field(ge=0), at_most(2**32 - 1)]
"""Range of seeds that every library's generator accepts."""
ProcessCount = Annotated[int, Field(ge=1), at_most(65_536)]


def _path(text: str) -> str:
    if re.search(r"\$[A-Za-z_]", text):
        raise PydanticCustomError(SAID_ITSELF, "$NAME is not expanded; write ${NAME}")
    expanded = os.path.expanduser(text)
    if re.match("~[^~]*(/|$)", expanded):
        raise PydanticCustomError(SAID_ITSELF, "~ names no home directory here")
    return expanded


IS_PATH = AfterValidator(_path)
PathText = Annotated[str, Field(min_length=1), IS_PATH]
"""A path: ~ is the home directory, as in a shell."""

Problems = Iterator[tuple[str, ...]]
"""Yielded by a rule: field, message, related fields; fields are dotted paths from the rule's section."""
HERE = "\0"
"""In a message: the path of the rule's section, dot included, for sections used at several paths."""
_Method = TypeVar("_Method", bound=Callable[..., Problems])


class Section(BaseModel):
    """Base of all sections: frozen; unknown keys, type coercion and non-finite numbers are errors."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        defer_build=True,  # a command builds the schema of its own root alone
    )

    _written: dict[Path, str] = PrivateAttr(default_factory=dict)  # of a root: see megarl.config.load.public

    @field_validator("*")
    @classmethod
    def _in_reach(cls, value: Any) -> Any:
        if type(value) in (int, float) and abs(value) > MAX_NUMBER:
            raise PydanticCustomError(SAID_ITSELF, f"expected at most {MAX_NUMBER:.0e}".replace("+", ""))
        return value

    def changed(self, *names: str) -> Iterator[tuple[str, Any]]:
        """Yield (name, value) of these fields, dotted paths allowed, that differ from their default."""
        for name in names:
            *inner, last = name.split(".")
            section: Section = functools.reduce(getattr, inner, self)
            of = type(section).model_fields[last]
            default = of.get_default(call_default_factory=True, validated_data={})
            if (value := vars(section).get(last, default)) != default:  # absent if it failed the schema
                yield name, value

    def unused(self, names: str, why: str, *related: str) -> Problems:
        """Rule: these fields (space-separated) keep their default; ``why`` says why they have no effect."""
        for name, value in self.changed(*names.split()):
            yield name, f"{why} (got {value if isinstance(value, str) else show(value)})", *related


def rule(method: _Method) -> _Method:
    """Mark a method as a rule: it yields the invalid combinations of fields that have valid types.

    A rule never raises, so all violations are reported together. It belongs to the section whose fields it
    checks, or to the root (or base of roots) that has all sections it checks.
    """
    method.is_rule = True  # type: ignore[attr-defined]
    return method


def as_violation(problem: tuple[str, ...], at: Path = ()) -> Violation:
    """Convert a problem yielded by a rule of the section at ``at``."""
    field, message, *others = problem
    path, *related = [(*at, *each.split(".")) for each in (field, *others)]
    return Violation(path, message.replace(HERE, "".join(f"{name}." for name in at)), tuple(related))


@functools.cache
def rules_of(kind: type) -> list[str]:
    """Return the names of the rule methods, those of bases first."""
    members = ((name, each) for base in reversed(kind.__mro__) for name, each in vars(base).items())
    rules = (name for name, each in members if isinstance(each, FunctionType) and hasattr(each, "is_rule"))
    return list(dict.fromkeys(rules))


def find_violations(section: Section, at: Path = (), *, partial: bool = False) -> list[Violation]:
    """Return all violated rules of ``section``, whose path is ``at``, and of the sections in it.

    With ``partial`` fields that failed the schema are absent; rules that read one of them are skipped.
    """
    found: list[Violation] = []
    for name in rules_of(type(section)):
        try:
            for problem in getattr(section, name)():
                found.append(as_violation(problem, at))
        except (AttributeError, TypeError, ValueError):
            if not partial:
                raise
    for name in type(section).model_fields:
        value = vars(section).get(name)
        entries = value.items() if isinstance(value, dict) else ()
        for path, each in ((name,), value), *(((name, key), each) for key, each in entries):
            if isinstance(each, Section):
                found += find_violations(each, (*at, *path), partial=partial)
    return found
