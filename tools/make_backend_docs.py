"""Write the tables of docs/backends.md from the rules of the configuration.

python tools/make_backend_docs.py           write the page
python tools/make_backend_docs.py --check   exit 1 if the page does not match the code
"""

from __future__ import annotations

import sys
from pathlib import Path

from megarl.config.trainer import TrainerConfig
from megarl.config.training import ALWAYS_IN_TORCH, OF_MEGATRON
from megarl.models import FAMILIES

PAGE = Path(__file__).resolve().parent.parent / "docs" / "backends.md"
BEGIN, END = "<!-- tables: tools/make_backend_docs.py -->", "<!-- end of tables -->"


def tables() -> str:
    """Return the tables of settings by backend, and the families with a weight table."""
    rows = [(name, "yes", "refused") for name in OF_MEGATRON]
    rows += [(name, "yes", "always so") for name in ALWAYS_IN_TORCH]
    rows += [
        (f"trainer.{name}", "refused", "yes") for name in TrainerConfig.model_fields if name != "backend"
    ]
    rows += [("model.trust_remote_code", "refused", "yes")]
    lines = ["| setting | megatron | torch |", "|---|---|---|"]
    lines += [f"| `{name}` | {megatron} | {torch} |" for name, megatron, torch in rows]
    families = ", ".join(f"`{name}`" for name in FAMILIES)
    lines += [
        "",
        f"Families with a table, which the Megatron backend needs: {families}. vLLM aliases or copies "
        "weights by the same tables, but for `smollm3`, which it loads as whole tensors.",
    ]
    return "\n".join(lines)


def render(page: str) -> str:
    """Return ``page`` with its tables replaced by those of the code."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n\n{tables()}\n\n{END}{after}"


def main() -> int:
    """Write the page, or compare it."""
    page = PAGE.read_text()
    wanted = render(page)
    if "--check" in sys.argv[1:]:
        return int(page != wanted)
    PAGE.write_text(wanted)
    return 0


if __name__ == "__main__":
    sys.exit(main())
