"""Write docs/configuration.md from the configuration schema.

python tools/make_config_docs.py           write the page
python tools/make_config_docs.py --check   exit 1 if the page does not match the schema
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from pydantic.fields import FieldInfo

from megarl.config.introspect import describe_field, sections_of, tag_field, tag_of
from megarl.config.section import Section
from megarl.jobs import roots

PAGE = Path(__file__).resolve().parent.parent / "docs" / "configuration.md"

INTRODUCTION = """\
# Configuration

<!-- Written by tools/make_config_docs.py from the classes in megarl/config/; edit there. -->

A run is described by one YAML file, and settings on the command line that replace the file's. `megarl plan`
reads its own file in the same way.

```
megarl grpo --config configs/quickstart_grpo.yaml optimizer.lr=2e-4 data.train.arguments.max_digits=3
megarl grpo --config configs/quickstart_grpo.yaml --dry-run      # print the resolved configuration and stop
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


def render() -> str:
    """Return the whole page."""
    parts = [INTRODUCTION]
    described: dict[type[Section], str] = {}
    for command, root in roots().items():
        parts.append(f"## megarl {command}\n\n{_sentence(root)}\n")
        parts += _render_sections(root, command, described)
    return "\n".join(parts)


def _render_sections(root: type[Section], command: str, described: dict[type[Section], str]) -> list[str]:
    rows, tables = [], []
    for name, field in root.model_fields.items():
        need = "required" if field.is_required() else "optional"
        if not sections_of(field.annotation):  # a plain value
            value = f"{describe_field(field)}; default {_default(field)}"
            rows.append(f"| `{name}` | {value} | {_cell(field.description)} |")
            continue
        (section,) = sections_of(field.annotation)
        link = described.get(section)
        if link is None:
            described[section] = link = f"{command}-{name}"
            tables += _render_table(section, name, link, described)
        rows.append(f"| [`{name}`](#{link}) | {need} | {_sentence(section)} |")
    return ["| section | | |\n|---|---|---|\n" + "\n".join(rows) + "\n", *tables]


def _render_table(
    section: type[Section], path: str, anchor: str, described: dict[type[Section], str]
) -> list[str]:
    title = f"### `{path}`" + (f" with `{tag_field(section)}: {tag_of(section)}`" if tag_of(section) else "")
    rows, nested = [], []
    for name, field in section.model_fields.items():
        links = []
        for inner in sections_of(field.annotation):
            inner_anchor = f"{anchor}-{name}" + (f"-{tag_of(inner)}" if tag_of(inner) else "")
            if inner not in described:
                described[inner] = inner_anchor
                nested += _render_table(inner, f"{path}.{name}", inner_anchor, described)
            links.append(f"[{tag_of(inner) or 'see below'}](#{described[inner]})")
        kind = _type(field, links)
        rows.append(f"| `{name}` | {kind} | {_default(field)} | {_cell(field.description)} |")
    table = "| key | type | default | |\n|---|---|---|---|\n" + "\n".join(rows)
    return [f'<a id="{anchor}"></a>\n{title}\n\n{_sentence(section)}\n\n{table}\n', *nested]


def _type(field: FieldInfo, links: list[str]) -> str:
    text = describe_field(field)
    return _cell(f"{text}: {', '.join(links)}" if links else text)


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "**required**"
    value: Any = field.get_default(call_default_factory=True, validated_data={})
    return "" if isinstance(value, Section) else f"`{json.dumps(value)}`"


def _sentence(section: type[Section]) -> str:
    return _cell((section.__doc__ or "").strip())


def _cell(text: str | None) -> str:
    assert text, "every field and section of the schema carries a docstring"
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


if __name__ == "__main__":
    if "--check" in sys.argv[1:]:
        if not PAGE.is_file() or PAGE.read_text(encoding="utf-8") != render():
            sys.exit(f"{PAGE} is not what the schema says; run python tools/make_config_docs.py")
    else:
        PAGE.parent.mkdir(exist_ok=True)
        PAGE.write_text(render(), encoding="utf-8")
