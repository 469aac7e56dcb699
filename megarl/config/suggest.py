"""Suggestions for unknown keys."""

from __future__ import annotations

from difflib import get_close_matches
from typing import Any

from megarl.config.foreign_names import called_here
from megarl.config.introspect import fields_at, sections_of, select_section, tag_of, walk
from megarl.config.renamed import RENAMED
from megarl.config.section import Section
from megarl.config.violation import Path, dotted
from megarl.jobs import roots

REPLACED = {
    "reasoning_gym_mixture": "use a mixture of reasoning_gym sources, each with its own curriculum",
}
"""Removed source kind -> its replacement."""


def explain_unknown(root: type[Section], path: Path, around: Any) -> str:
    """Return the error message for the unknown key ``path``, with the best suggestion.

    ``around`` is the enclosing mapping, which selects the member of a tagged union. Order of suggestions: the
    setting that other tools call so, a close name in the same section, another ``source`` with this key, the
    same name elsewhere, another command with this key, a less close name in the same section, a close name
    elsewhere.
    """
    if new := RENAMED.get(dotted(path)):
        return f"unknown key; it is called {new} now"
    key = path[-1].replace("-", "_").lower()
    if here := [each for each in called_here(key) if fields_at(root, tuple(each.split(".")))]:
        return f"unknown key; here it is {' or '.join(here)}"
    members = [section for field in fields_at(root, path[:-1]) for section in sections_of(field.annotation)]
    chosen = select_section(members, around)
    beside = [name for section in ([chosen] if chosen else members) for name in section.model_fields]
    elsewhere = {p: p[-1] for p in walk(root)}
    if near := get_close_matches(key, beside, n=1, cutoff=0.8):
        return _meant((*path[:-1], near[0]))
    if sources := [tag_of(section) for section in members if path[-1] in section.model_fields]:
        return f"unknown key here; it belongs to source {sources[0]}"
    if same := [p for p, name in elsewhere.items() if name == key]:
        return _meant(*same[:3])
    if commands := [name for name, kind in roots().items() if kind is not root and fields_at(kind, path)]:
        return f"unknown key here; it is a setting of megarl {', '.join(commands)}"
    if near := get_close_matches(key, beside, n=1, cutoff=0.6):
        return _meant((*path[:-1], near[0]))
    if near := get_close_matches(key, set(elsewhere.values()), n=1, cutoff=0.75):
        return _meant(next(p for p, name in elsewhere.items() if name == near[0]))
    return f"unknown key; valid here: {', '.join(beside)}"


def _meant(*paths: Path) -> str:
    return f"unknown key; did you mean {' or '.join(dotted(p) for p in paths)}?"
