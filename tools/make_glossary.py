"""Write megarl/metrics/page/glossary.json, what the report says about a metric, from docs/metrics.md.

``--check`` exits with 1 if the file is out of date.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "metrics.md"
GLOSSARY = ROOT / "megarl" / "metrics" / "page" / "glossary.json"


def glossary(text: str) -> dict[str, str]:
    """Return metric -> meaning, of the rows of all tables whose first column has names in backticks."""
    found = {}
    for names, meaning in re.findall(r"^\| (`.*?`) \| (.*?) \|$", text, re.MULTILINE):
        for name in re.findall(r"`([^`]+)`", names):
            found[name] = meaning.replace("`", "")
    return found


def main() -> int:
    """Write or check the file."""
    text = json.dumps(glossary(PAGE.read_text(encoding="utf-8")), indent=1, ensure_ascii=False) + "\n"
    if "--check" in sys.argv[1:]:
        if GLOSSARY.read_text(encoding="utf-8") == text:
            return 0
        print(f"{GLOSSARY} is out of date: python tools/make_glossary.py")
        return 1
    GLOSSARY.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
