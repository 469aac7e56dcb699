"""reasoning-gym's verifiers: each task scores with ``score_answer`` of its dataset."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from reasoning_gym.utils import extract_answer

from megarl.environments.base import Verifier
from megarl.environments.tasks import make_dataset
from megarl.environments.text import last_number

if TYPE_CHECKING:
    from megarl.config.data import ReasoningGymSource
    from megarl.records import Prompt


class ReasoningGymEnvironment(Verifier):
    """Scores with the task's ``score_answer``; prompts have their entry in ``metadata["entry"]``.

    The answer is the content of the last ``<answer>...</answer>``, else the whole response, stripped. With
    ``source.extract`` last_number it is the last number in that text ("" without one), for models that
    answer in sentences. ``info`` has the scored ``answer`` and whether it was tagged (``answer_tags``).
    Scores are the task's, in [0, 1]; many tasks give partial credit, so "solved" means a reward of 1. With
    ``source.partial_credit`` false every lower score becomes 0.
    """

    def __init__(self, source: ReasoningGymSource, field: str = "data.train") -> None:
        self._dataset = make_dataset(source, field)
        self._extract = source.extract
        self._partial_credit = source.partial_credit

    async def judge(self, prompt: Prompt, response_text: str) -> tuple[float, dict[str, Any]]:
        """Return a score in [0, 1] and ``{"answer": str, "answer_tags": bool}``."""
        tagged = extract_answer(response_text)
        answer = response_text.strip() if tagged is None else tagged.strip()
        if self._extract == "last_number":
            answer = last_number(answer)
        reward = self._dataset.score_answer(answer, entry=prompt.metadata["entry"])
        if reward < 1 and not self._partial_credit:
            reward = 0.0
        return float(reward), {"answer": answer, "answer_tags": tagged is not None}
