"""What the user may have meant by a key that does not exist."""

from __future__ import annotations

from difflib import get_close_matches
from typing import Any

from megarl.config.introspect import fields_at, sections_of, select_section, tag_of, walk
from megarl.config.renamed import RENAMED
from megarl.config.section import Section
from megarl.config.violation import Path, dotted
from megarl.jobs import roots

REPLACED = {
    "reasoning_gym_mixture": "use a mixture of reasoning_gym sources, each with its own curriculum",
}
"""What took the place of kinds that there were."""


def explain_unknown(root: type[Section], path: Path, around: Any) -> str:
    """Why ``path`` is refused and what comes nearest.

    ``around`` is what stands around it, which tells the member of a tagged union. Looked for in this order: a
    near name beside it, another ``source`` that has it, the same name elsewhere, another command that has it,
    a less near name beside it, a near name elsewhere.
    """
    if new := RENAMED.get(dotted(path)):
        return f"unknown key; it is called {new} now"
    key = path[-1].replace("-", "_").lower()
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
