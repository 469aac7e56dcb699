"""Write docs/configuration.md and the pages in docs/configuration/ from the configuration schema.

python tools/make_config_docs.py           write the pages
python tools/make_config_docs.py --check   exit 1 if a page does not match the schema
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic.fields import FieldInfo

from megarl.config.environments import Judging
from megarl.config.introspect import (
    describe_field,
    entries_of,
    sections_of,
    tag_field,
    tag_of,
)
from megarl.config.section import Section, rules_of
from megarl.jobs import JOBS, roots

DOCS = Path(__file__).resolve().parent.parent / "docs"

OVERVIEW = """\
# Configuration

<!-- Written by tools/make_config_docs.py from the classes in megarl/config/; edit there. -->

One YAML file describes a run. Settings on the command line replace the file's.

```bash
megarl grpo --config configs/quickstart_grpo.yaml optimizer.lr=2e-4 data.train.arguments.max_digits=3
megarl grpo --config configs/quickstart_grpo.yaml --dry-run      # say what the run would do
megarl config optimizer.lr                                       # explain one setting
```

- **Types** follow YAML 1.2: `1e-5` is a number, `true` and `false` are booleans, `on`, `off`, `yes` and `no`
  are strings. Strings and numbers are not converted into each other; an integer is accepted as a number. A
  repeated key is an error.
- **Overrides** have the form `section.key=value`; later ones win. For a string setting the value is taken
  literally (in quotes, YAML escapes work: `'data.format.prompt_suffix="\\nAnswer:"'`), else it is parsed as
  YAML: `logging.wandb=null`, `'data.held_out={source: jsonl, path: test.jsonl}'`. A section is replaced, not
  merged.
- **Environment variables** replace `${NAME}` and `${NAME:-default}`. Outside quotes the result has its YAML
  type, so `${STEPS:-10}` is a number. `$${` is a literal `${`. A variable that is unset and has no default is
  an error.
- **Paths** are relative to the current directory.
- **Errors** are reported all together before anything starts, one line each with file and line, invalid
  combinations (e.g. `sequence_parallel` without tensor parallelism) and missing files included. The exit code
  is 2.
- The run directory holds the resolved configuration, `config.yaml`; it is a valid `--config` file.
"""

SHARED = {
    "common": ("Sections of several commands", "Sections that mean the same in every command that has them."),
    "online": (
        "Sections of online runs",
        "Prompts, rollouts and evaluation, shared by grpo, ppo, distill and eval.",
    ),
    "preference": ("Sections of preference data", "Pairs of responses, shared by dpo and rm."),
    "environments": (
        "Environments",
        "`environment` of a prompt source scores responses, in one turn or several; `kind` selects it.",
    ),
}
"""Pages of sections that several commands have: title and first sentence."""

ONLINE = {"grpo", "ppo", "distill", "eval"}


class Pages:
    """The pages, each section of the schema on one of them."""

    def __init__(self) -> None:
        self.roots: dict[str, type[Section]] = roots()
        self.users: dict[type[Section], set[str]] = {}
        self.paths: dict[type[Section], str] = {}
        for command, root in self.roots.items():
            self._collect(root, command, "")

    def _collect(self, section: type[Section], command: str, at: str) -> None:
        for name, field in section.model_fields.items():
            path = f"{at}.{name}".removeprefix(".")
            for inner in _inner(field):
                seen = command in self.users.get(inner, ())
                self.users.setdefault(inner, set()).add(command)
                self.paths.setdefault(inner, path)
                if not seen:
                    self._collect(inner, command, path)

    def page_of(self, section: type[Section]) -> str:
        """Return the name of the page that describes a section."""
        users = self.users[section]
        if issubclass(section, Judging):
            return "environments"
        if len(users) == 1:
            return next(iter(users))
        if users <= ONLINE:
            return "online"
        return "preference" if users == {"dpo", "rm"} else "common"

    def title(self, section: type[Section]) -> str:
        """Return a section's heading, unique on its page."""
        tag = tag_of(section)
        return f"`{self.paths[section]}`" + (f" with `{tag_field(section)}: {tag}`" if tag else "")

    def link(self, section: type[Section], text: str, page: str) -> str:
        """Return a Markdown link from ``page`` to a section."""
        there = self.page_of(section)
        anchor = re.sub(r"[^\w\- ]", "", self.title(section)).lower().replace(" ", "-")
        return f"[{text}]({'' if there == page else f'{there}.md'}#{anchor})"

    def render(self) -> dict[str, str]:
        """Return name -> text of all pages, names relative to docs/."""
        pages = {"configuration.md": self._overview()}
        for command, root in self.roots.items():
            pages[f"configuration/{command}.md"] = self._command(command, root)
        for page, (title, sentence) in SHARED.items():
            parts = [f"# {title}\n\n{_GENERATED}\n\n{sentence}\n", *self._sections(page)]
            pages[f"configuration/{page}.md"] = "\n".join(parts)
        return pages

    def _overview(self) -> str:
        rows = [
            f"| [`megarl {command}`](configuration/{command}.md) | {_purpose(command)} |"
            for command in self.roots
        ]
        shared = [f"- [{title}](configuration/{page}.md): {text}" for page, (title, text) in SHARED.items()]
        table = "| command | |\n|---|---|\n" + "\n".join(rows)
        return f"{OVERVIEW}\n## Pages\n\n{table}\n\n" + "\n".join(shared) + "\n"

    def _command(self, command: str, root: type[Section]) -> str:
        parts = [f"# Configuration of megarl {command}\n\n{_GENERATED}\n\n{_purpose(command)}\n"]
        if command in JOBS:
            parts.append(f"```bash\nmegarl {command} --config {JOBS[command].example}\n```\n")
        rows = []
        for name, field in root.model_fields.items():
            need = "required" if field.is_required() else "optional"
            if sections := sections_of(field.annotation):
                (section,) = sections
                text = _sentence(section)
                rows.append(f"| {self.link(section, f'`{name}`', command)} | {need} | {text} |")
            else:
                value = f"{_words(field)}; default {_default(field)}"
                rows.append(f"| `{name}` | {value} | {_cell(field.description)} |")
        parts.append("| section | | |\n|---|---|---|\n" + "\n".join(rows) + "\n")
        if rules := _rules(root):
            parts.append(f"Rules across sections:\n\n{rules}\n")
        parts += self._sections(command)
        keys = [
            f"| `{path}` | {self._kind(field, command)} | {_default(field)} |"
            for path, field in _leaves(root)
        ]
        parts.append("## All keys\n\n| key | type | default |\n|---|---|---|\n" + "\n".join(keys) + "\n")
        return "\n".join(parts)

    def _sections(self, page: str) -> list[str]:
        own = [section for section in self.users if self.page_of(section) == page]
        titles = [self.title(section) for section in own]
        assert len(set(titles)) == len(titles), f"{page}: two sections of one heading"
        return [self._section(section, page) for section in own]

    def _section(self, section: type[Section], page: str) -> str:
        rows = [
            f"| `{name}` | {self._kind(field, page)} | {_default(field)} | {_cell(field.description)} |"
            for name, field in section.model_fields.items()
        ]
        of = ""
        if page in SHARED:
            of = "Of " + ", ".join(
                f"[{each}]({each}.md)" for each in self.roots if each in self.users[section]
            )
            of = f"\n{of}.\n"
        text = f"## {self.title(section)}\n\n{_sentence(section)}\n{of}\n"
        text += "| key | type | default | |\n|---|---|---|---|\n" + "\n".join(rows) + "\n"
        return text + (f"\nRules:\n\n{rules}\n" if (rules := _rules(section)) else "")

    def _kind(self, field: FieldInfo, page: str) -> str:
        inner = _inner(field)
        if len(inner) > 1 and all(issubclass(each, Judging) for each in inner):
            return f"[by `kind`]({'' if page == 'environments' else 'environments.md'}#environments)"
        links = [self.link(each, f"`{tag_of(each)}`" if tag_of(each) else "section", page) for each in inner]
        if not links:
            return _words(field)
        entries = "names, each with " if entries_of(field.annotation) is not None else ""
        return entries + ", ".join(links) + (" or null" if "null" in describe_field(field) else "")


_GENERATED = "<!-- Written by tools/make_config_docs.py from the classes in megarl/config/; edit there. -->"


def _inner(field: FieldInfo) -> list[type[Section]]:
    """Return the sections of a field, those of a mapping's values included."""
    entries = entries_of(field.annotation)
    return sections_of(field.annotation) + ([] if entries is None else sections_of(entries))


def _leaves(section: type[Section], at: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Yield path and field of every key below a section; a section of several kinds counts as one key."""
    for name, field in section.model_fields.items():
        if len(sections := sections_of(field.annotation)) == 1:
            yield from _leaves(sections[0], f"{at}{name}.")
        else:
            yield f"{at}{name}", field


def _purpose(command: str) -> str:
    if command in JOBS:
        text = JOBS[command].help
        return f"{text[0].upper()}{text[1:]}."
    return "Estimate GPU memory and weight-sync volume of a layout."


def _rules(section: type[Section]) -> str:
    """Return the rules of a section as a list, by their docstrings."""
    texts = []
    refused: dict[str, str] = getattr(section, "refused", {})
    for name in rules_of(section):
        text = getattr(section, name).__doc__
        assert text, f"{section.__name__}.{name}: a rule's docstring states it"
        if name == "_refused":
            texts += [f"- `{path}` is {_plain(why)}." for path, why in refused.items()]
        else:
            texts.append(f"- {_plain(text)}")
    return "\n".join(texts)


def _words(field: FieldInfo) -> str:
    """Return the type of a plain field as Python and YAML people write it."""
    text = describe_field(field)
    for words, name in (
        ("an integer", "int"),
        ("a number", "float"),
        ("a string (not empty)", "str"),
        ("a string", "str"),
        ("true or false", "bool"),
        ("a list, each", "list of"),
    ):
        text = text.replace(words, name)
    return _cell(re.sub(r"'([^']*)'", r"`\1`", text))


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "**required**"
    value: Any = field.get_default(call_default_factory=True, validated_data={})
    return "" if isinstance(value, Section) else f"`{json.dumps(value)}`".replace("|", "\\|")


def _sentence(section: type[Section]) -> str:
    return _cell((section.__doc__ or "").strip())


def _cell(text: str | None) -> str:
    assert text, "every field and section of the schema carries a docstring"
    return _plain(text).replace("|", "\\|")


def _plain(text: str) -> str:
    """Return one line, in which < outside code is no tag."""
    parts = re.split(r"(`[^`]*`)", " ".join(text.split()))
    return "".join(part if part.startswith("`") else part.replace("<", "&lt;") for part in parts)


def differing() -> list[Path]:
    """Return the pages that are not as the schema has them, left-over pages included."""
    pages = {DOCS / name: text for name, text in Pages().render().items()}
    there = {DOCS / "configuration.md", *(DOCS / "configuration").glob("*.md")}
    return sorted(
        path
        for path in there | set(pages)
        if path not in pages or not path.is_file() or path.read_text(encoding="utf-8") != pages[path]
    )


if __name__ == "__main__":
    if "--check" in sys.argv[1:]:
        if wrong := differing():
            names = ", ".join(str(path.relative_to(DOCS)) for path in wrong)
            sys.exit(f"docs/: {names} not as the schema has them; run python tools/make_config_docs.py")
    else:
        (DOCS / "configuration").mkdir(exist_ok=True)
        rendered = Pages().render()
        for path in (DOCS / "configuration").glob("*.md"):
            if f"configuration/{path.name}" not in rendered:
                path.unlink()
        for name, text in rendered.items():
            (DOCS / name).write_text(text, encoding="utf-8")
