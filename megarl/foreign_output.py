"""Keep other libraries' progress bars and warnings out of a run's output."""

from __future__ import annotations

import sys
import warnings
from collections.abc import MutableMapping

_TALKATIVE = ("torch", "megatron", "transformers", "ray", "vllm", "datasets", "huggingface_hub")


def quieten(environ: MutableMapping[str, str]) -> None:
    """Turn off bars and warnings; call it before the libraries are imported, and `quieten_bars` after.

    Warnings stay on with ``python -W`` or PYTHONWARNINGS, and downloads keep their bars on a terminal.
    """
    if not sys.warnoptions:
        for category in (FutureWarning, DeprecationWarning, UserWarning):
            warnings.filterwarnings("ignore", category=category, module=rf"({'|'.join(_TALKATIVE)})(\.|$)")
    if not sys.stderr.isatty():
        environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")


def quieten_bars() -> None:
    """Turn off the bars of transformers (loading and writing weights), if it has been imported."""
    if "transformers" in sys.modules:
        sys.modules["transformers"].utils.logging.disable_progress_bar()
