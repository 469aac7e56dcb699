"""A language model that grades responses, behind an OpenAI-compatible endpoint."""

from __future__ import annotations

import asyncio
import os
import re
from typing import TYPE_CHECKING, Any

import httpx

from megarl.environments.base import Verifier
from megarl.errors import UserError

if TYPE_CHECKING:
    from megarl.config.environments import JudgeConfig
    from megarl.records import Prompt

_MAX_SHOWN = 200


class JudgeError(RuntimeError):
    """No score could be had: the episode fails, and nothing is rewarded."""


class JudgeEnvironment(Verifier):
    """Reward: the judge's score over ``max_score``. ``info`` has the judge's ``verdict`` and ``attempts``.

    A request that is not answered (connection, time-out, status 429 or 5xx) or whose reply has no score in
    [0, max_score] is asked again, after a pause that doubles. Any other status is an error at once: asking
    again would not help. After the last attempt it is an error, never a reward of 0.
    """

    def __init__(self, config: JudgeConfig, field: str = "environment") -> None:
        self._config = config
        self._score = re.compile(config.score_pattern)
        self._headers: dict[str, str] = {}
        if config.api_key_variable is not None:
            key = os.environ.get(config.api_key_variable)
            if not key:
                raise UserError(f"{field}.api_key_variable: {config.api_key_variable} is not set")
            self._headers["Authorization"] = f"Bearer {key}"
        self.max_concurrency = config.max_concurrency
        # In a list, so that episodes (shallow copies) share the connections one of them opened.
        self._clients: list[httpx.AsyncClient] = []

    async def judge(self, prompt: Prompt, response_text: str) -> tuple[float, dict[str, Any]]:
        """Reward in [0, 1]. Raises JudgeError with the last attempt's reason."""
        question = prompt.metadata.get("question", prompt.text)
        text = fill(
            self._config.prompt,
            question=str(question),
            answer=str(prompt.metadata.get("answer", "")),
            response=response_text,
        )
        pause = self._config.retry_seconds
        reason = ""
        for attempt in range(1, self._config.num_attempts + 1):
            if attempt > 1:
                await asyncio.sleep(pause)
                pause *= 2
            verdict, reason = await self._ask(text)
            score, problem = self._read(verdict) if verdict is not None else (None, reason)
            if score is not None:
                reward = score / self._config.max_score
                return reward, {"verdict": str(verdict)[-_MAX_SHOWN:], "attempts": attempt}
            reason = problem
        raise JudgeError(f"no score after {self._config.num_attempts} requests; the last: {reason}")

    async def _ask(self, text: str) -> tuple[str | None, str]:
        """The judge's reply, or None and why there is none."""
        config = self._config
        if not self._clients:
            self._clients.append(httpx.AsyncClient(headers=self._headers))
        body = {
            "model": config.model,
            "messages": [{"role": "user", "content": text}],
            "temperature": config.temperature,
            "max_tokens": config.max_tokens,
        }
        url = config.base_url.rstrip("/") + "/chat/completions"
        try:
            # httpx bounds each read; this bounds the whole answer, however slowly it drips.
            async with asyncio.timeout(config.request_timeout_seconds):
                answer = await self._clients[0].post(url, json=body, timeout=config.request_timeout_seconds)
        except TimeoutError:
            return None, f"no answer within {config.request_timeout_seconds:g} s"
        except httpx.HTTPError as error:
            return None, f"{type(error).__name__}: {error}"
        if answer.status_code == 429 or answer.status_code >= 500:
            return None, f"status {answer.status_code}: {answer.text[:_MAX_SHOWN]}"
        if answer.status_code != 200:
            raise JudgeError(f"{url}: status {answer.status_code}: {answer.text[:_MAX_SHOWN]}")
        try:
            content = answer.json()["choices"][0]["message"]["content"]
        except (ValueError, KeyError, IndexError, TypeError):
            content = None
        if not isinstance(content, str):
            return None, f"not a chat completion: {answer.text[:_MAX_SHOWN]}"
        return content, ""

    def _read(self, verdict: str) -> tuple[float | None, str]:
        """The score in a verdict, or None and why there is none."""
        found = list(self._score.finditer(verdict))
        if not found:
            return None, f"no score in {verdict[-_MAX_SHOWN:]!r}"
        try:
            score = float(found[-1][1])
        except (TypeError, ValueError):
            return None, f"the score {found[-1][1]!r} is no number"
        if not 0 <= score <= self._config.max_score:
            return None, f"the score {score:g} is outside [0, {self._config.max_score:g}]"
        return score, ""


def fill(template: str, **values: str) -> str:
    """``template`` with {name} replaced for the names given, once: other braces are text."""
    pattern = re.compile("{(" + "|".join(values) + ")}")
    return pattern.sub(lambda match: values[match[1]], template)
