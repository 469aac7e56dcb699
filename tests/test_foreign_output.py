"""Other libraries' warnings stay out of a run's output, its own and those of user code do not."""

from __future__ import annotations

import sys
import warnings

import pytest

from megarl.foreign_output import quieten


def heard(environ: dict[str, str]) -> list[str]:
    """Return the modules whose FutureWarning is shown after :func:`quieten`."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        quieten(environ)
        for module in (
            "torch.nn",
            "megatron.core.x",
            "transformers",
            "torchlike",
            "my_rewards",
            "megarl.cli",
        ):
            warnings.warn_explicit("old", FutureWarning, "file.py", 1, module=module, registry={})
            warnings.warn_explicit(f"by {module}", RuntimeWarning, "file.py", 2, module=module, registry={})
    kinds = [str(each.message) for each in caught if each.category is RuntimeWarning]
    assert len(kinds) == 6, "numbers that go wrong are never hidden"
    return [str(each.message) for each in caught if each.category is FutureWarning]


def test_warnings_of_libraries_are_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "warnoptions", [])
    assert len(heard({})) == 3  # torchlike, my_rewards, megarl


def test_python_w_keeps_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "warnoptions", ["default"])
    assert len(heard({})) == 6


def test_bars_of_downloads_stay_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "warnoptions", ["default"])
    for is_terminal in (True, False):
        environ: dict[str, str] = {"HF_DATASETS_DISABLE_PROGRESS_BARS": "0"}
        monkeypatch.setattr(sys.stderr, "isatty", lambda is_terminal=is_terminal: is_terminal, raising=False)
        quieten(environ)
        assert environ.get("HF_HUB_DISABLE_PROGRESS_BARS") == (None if is_terminal else "1")
        assert environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] == "0", "what the user has set stays"
