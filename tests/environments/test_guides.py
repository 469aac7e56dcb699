"""The guides match the code: the code on the page is loaded and run as a user would."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path
from typing import Any

import pytest

from megarl.config.environments import EnvironmentSource
from megarl.config.grpo import GrpoConfig
from megarl.config.load import load_config
from megarl.environments import grade, make
from megarl.records import Prompt

ROOT = Path(__file__).parents[2]


def python_blocks(page: str) -> list[str]:
    text = (ROOT / "docs" / "guides" / page).read_text(encoding="utf-8")
    return re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def test_the_custom_environment_of_the_guide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    [code] = python_blocks("environments.md")
    assert len(code.splitlines()) <= 30
    (tmp_path / "word_count.py").write_text(code)
    config = load_config(GrpoConfig, ROOT / "configs" / "grpo_word_count.yaml", check_files=False)
    monkeypatch.chdir(tmp_path)  # a package in the current directory is found
    source = config.data.train
    assert isinstance(source, EnvironmentSource)
    environment: Any = make(source)
    for seed in range(20):
        made = environment.problem(seed)
        count = int(made.answer)
        assert 1 <= count <= 6
        prompt = Prompt(0, made.text, [1], {"answer": made.answer})
        assert asyncio.run(grade(environment, prompt, "la " * count)) == (1.0, {"words": count})
        assert asyncio.run(grade(environment, prompt, "la " * 2 * count))[0] == 0.0
        assert asyncio.run(grade(environment, prompt, ""))[0] == 0.0


def test_the_game_of_the_multi_turn_guide():
    [code] = python_blocks("multi-turn.md")
    space: dict[str, Any] = {}
    exec(compile(code, "multi-turn.md", "exec"), space)
    game = space["Counting"]()

    async def play() -> list[Any]:
        assert (await game.reset(Prompt(0, "p", [1]))).text == "p"
        return [await game.step(action) for action in ("go", "on", "stop it")]

    results = asyncio.run(play())
    assert [result.observation.text for result in results[:2]] == ["1", "2"]
    assert [result.done for result in results] == [False, False, True]
    assert results[2].reward == 1.0
