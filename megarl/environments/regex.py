"""Score responses with a regular expression."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from megarl.environments.base import Verifier
from megarl.environments.text import same_number

if TYPE_CHECKING:
    from megarl.config.environments import RegexConfig
    from megarl.records import Prompt


class RegexEnvironment(Verifier):
    """Reward 1 if the response matches and its group ``answer`` equals the reference.

    Without that group any match gets 1. A match with another answer gets ``format_reward``, no match 0.
    Answers are compared as stripped text; if the reference is a JSON number (``answer_is_number``), as
    numbers: 42.0 equals 42. ``info`` has ``matched`` and the ``answer`` found. A pattern that does not
    finish hits the time limit of rollout.environments, and its episode is dropped.
    """

    def __init__(self, config: RegexConfig) -> None:
        self._pattern = re.compile(config.pattern, re.IGNORECASE if config.ignore_case else 0)
        self._config = config

    async def judge(self, prompt: Prompt, response_text: str) -> tuple[float, dict[str, Any]]:
        """Return a reward in {0, format_reward, 1}."""
        if self._config.full_match:
            match = self._pattern.fullmatch(response_text.strip())
        else:
            match = None
            for found in self._pattern.finditer(response_text):
                match = found
        if match is None:
            return 0.0, {"matched": False}
        if "answer" not in self._pattern.groupindex:
            return 1.0, {"matched": True}
        answer, reference = match["answer"], str(prompt.metadata["answer"])
        info = {"matched": True, "answer": answer}
        if answer is not None and self._plain(answer) == self._plain(reference):
            return 1.0, info
        if answer is not None and prompt.metadata.get("answer_is_number") and same_number(answer, reference):
            return 1.0, info
        return self._config.format_reward, info

    def _plain(self, text: str) -> str:
        return text.strip().casefold() if self._config.ignore_case else text.strip()
