"""reasoning-gym's own verifiers: each task judges with the ``score_answer`` of its data set."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from reasoning_gym.utils import extract_answer

from megarl.environments.base import Verifier
from megarl.environments.tasks import make_dataset

if TYPE_CHECKING:
    from megarl.config.schema import ReasoningGymSource
    from megarl.records import Prompt


class ReasoningGymEnvironment(Verifier):
    """Judges by the task's ``score_answer``; prompts carry their entry in ``metadata["entry"]``.

    The answer is the content of the last ``<answer>...</answer>`` where the response has one, else
    the whole response; stripped either way. ``info`` has the answer as judged and which it was
    (``answer_tags``). Scores are the task's own, in [0, 1]: many tasks give partial credit, so
    "solved" means a reward of 1.
    """

    def __init__(self, source: ReasoningGymSource, field: str = "data.train") -> None:
        self._dataset = make_dataset(source, field)

    async def judge(self, prompt: Prompt, response_text: str) -> tuple[float, dict[str, Any]]:
        """Score in [0, 1] and ``{"answer": str, "answer_tags": bool}``."""
        tagged = extract_answer(response_text)
        answer = response_text.strip() if tagged is None else tagged.strip()
        reward = self._dataset.score_answer(answer, entry=prompt.metadata["entry"])
        return float(reward), {"answer": answer, "answer_tags": tagged is not None}
