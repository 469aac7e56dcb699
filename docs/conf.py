"""The documentation site (`make docs`, into build/docs): these pages and megarl's docstrings."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

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
html_copy_source = True  # the .md of each page lies beside it, under _sources
html_sourcelink_suffix = ""
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


def _link_sources(app: Any, docname: str, source: list[str]) -> None:
    """Links to files outside docs/ become code (the site has none of them); HTML anchors become labels."""
    import re

    page = (ROOT / "docs" / docname).parent

    def plain(match: re.Match[str]) -> str:
        target = (page / match[2].partition("#")[0]).resolve()
        if "://" in match[2] or match[2].startswith("#") or target.is_relative_to(ROOT / "docs"):
            return match[0]
        return f"`{match[1].strip('`')}`" if target.exists() else match[0]

    text = re.sub(r"\[([^\]]+)\]\(([^)\s]+)\)", plain, source[0])
    # Anchors that other pages link to, as MyST writes them.
    source[0] = re.sub(r'^<a id="([^"]+)"></a>$', r"(\1)=", text, flags=re.MULTILINE)


def _write_llms_txt(app: Any, error: Exception | None) -> None:
    """llms.txt: every page with its title and its Markdown twin, for readers that are programs."""
    if error is not None:
        return
    lines = ["# MegaRL", "", "> Post-training of large language models on Megatron-Core and vLLM.", ""]
    for name in sorted(app.env.found_docs):
        title = app.env.titles[name].astext()
        lines.append(f"- [{title}](_sources/{name}.md)")
    (Path(app.outdir) / "llms.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def setup(app: Any) -> None:
    """Register the two steps above."""
    app.connect("source-read", _link_sources)
    app.connect("build-finished", _write_llms_txt)
