"""The documentation site (`make docs`, into build/docs): these pages and megarl's docstrings."""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path
from typing import Any

from docutils import nodes

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import megarl  # noqa: E402

project = "MegaRL"
author = "The MegaRL authors"
version = release = megarl.__version__
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.intersphinx",
    "sphinx_copybutton",
]
exclude_patterns = ["guides/README.md"]
html_theme = "furo"
html_title = "MegaRL"
html_copy_source = False  # _write_twins puts the .md of each page beside it
myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 4
# What megarl's public modules import; their docstrings are read without installing it.
autodoc_mock_imports = ["torch", "ray", "transformers", "megatron", "vllm", "safetensors", "tokenizers"]
autodoc_mock_imports += ["megarl.ops"]  # compiled
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_default_options = {"members": True, "show-inheritance": False}
intersphinx_mapping: dict[str, Any] = {}  # nothing is fetched while the site is built
suppress_warnings = ["misc.highlighting_failure"]


def without_outside_links(text: str, page: Path) -> str:
    """Return Markdown whose links to files outside docs/ are code: the site has none of those files."""

    def plain(match: re.Match[str]) -> str:
        target = (page.parent / match[2].partition("#")[0]).resolve()
        if "://" in match[2] or match[2].startswith("#") or target.is_relative_to(ROOT / "docs"):
            return match[0]
        return f"`{match[1].strip('`')}`" if target.exists() else match[0]

    return re.sub(r"\[([^\]]+)\]\(([^)\s]+)\)", plain, text)


def _link_sources(app: Any, docname: str, source: list[str]) -> None:
    """Links to files outside docs/ become code; HTML anchors become labels, as MyST writes them."""
    text = without_outside_links(source[0], ROOT / "docs" / f"{docname}.md")
    source[0] = re.sub(r'^<a id="([^"]+)"></a>$', r"(\1)=", text, flags=re.MULTILINE)


class _Markdown(nodes.NodeVisitor):
    """Markdown of a page that autodoc filled: headings, signatures, paragraphs, lists and code."""

    def __init__(self, document: nodes.document) -> None:
        super().__init__(document)
        self.parts: list[str] = []
        self.depth = 0

    def visit_section(self, node: nodes.section) -> None:
        self.depth += 1

    def depart_section(self, node: nodes.section) -> None:
        self.depth -= 1

    def visit_title(self, node: nodes.title) -> None:
        self._add(f"{'#' * self.depth} {node.astext()}")

    def visit_desc_signature(self, node: nodes.Element) -> None:
        self._add(f"### `{node.astext()}`")

    def visit_paragraph(self, node: nodes.paragraph) -> None:
        mark = "- " if isinstance(node.parent, nodes.list_item) else ""
        self._add(mark + node.astext().replace("\n", " "))

    def visit_field_name(self, node: nodes.field_name) -> None:
        self._add(f"**{node.astext()}**")

    def visit_literal_block(self, node: nodes.literal_block) -> None:
        self._add(f"```\n{node.astext()}\n```")

    def _add(self, text: str) -> None:
        self.parts.append(text)
        raise nodes.SkipNode

    def unknown_visit(self, node: nodes.Node) -> None:
        """Look into every other node."""

    def unknown_departure(self, node: nodes.Node) -> None:
        """Nothing to close."""


def _twin(app: Any, name: str) -> str:
    text = (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8")
    if "```{eval-rst}" not in text:
        text = re.sub(r"^::::.*?^::::$\n?", _listed, text, flags=re.MULTILINE | re.DOTALL)
        return without_outside_links(text, ROOT / "docs" / f"{name}.md")
    visitor = _Markdown(document := app.env.get_doctree(name))
    document.walkabout(visitor)
    return "\n\n".join(visitor.parts) + "\n"


def _listed(toctree: re.Match[str]) -> str:
    """A table of contents as a list of links to the pages' twins."""
    pages = re.findall(r"^([\w/-]+)$", toctree[0], re.MULTILINE)
    caption = re.search(r":caption: (.*)", toctree[0])
    heading = f"**{caption[1]}**\n\n" if caption else ""
    return heading + "".join(f"- [{page}]({page}.md)\n" for page in pages)


def _write_twins(app: Any, error: Exception | None) -> None:
    """Write PAGE.md beside every PAGE.html, and llms.txt, which lists them, for readers that are programs."""
    if error is not None or app.builder.name != "html":
        return
    lines = ["# MegaRL", "", "> Post-training of large language models on Megatron-Core and vLLM.", ""]
    index = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    for caption, toctree in re.findall(r":caption: (.*?)\n(.*?)::::", index, re.DOTALL):
        lines += [f"## {caption}", ""]
        for name in re.findall(r"^([\w/-]+)$", toctree, re.MULTILINE):
            lines.append(f"- [{app.env.titles[name].astext()}]({name}.md)")
        lines.append("")
    shutil.copytree(ROOT / "docs" / "images", Path(app.outdir) / "images", dirs_exist_ok=True)
    for name in app.env.found_docs:
        target = Path(app.outdir) / f"{name}.md"
        assert target.with_suffix(".html").is_file(), f"{name} has no page"
        target.write_text(_twin(app, name), encoding="utf-8")
        assert name == "index" or f"({name}.md)" in "\n".join(lines), f"{name} is not in llms.txt"
    (Path(app.outdir) / "llms.txt").write_text("\n".join(lines), encoding="utf-8")


def setup(app: Any) -> None:
    """Register the two steps above."""
    app.connect("source-read", _link_sources)
    app.connect("build-finished", _write_twins)
