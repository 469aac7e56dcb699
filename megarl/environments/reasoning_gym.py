"""reasoning-gym's own verifiers: each task judges with the ``score_answer`` of its data set."""

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
    """Judges by the task's ``score_answer``; prompts carry their entry in ``metadata["entry"]``.

    The answer is the content of the last ``<answer>...</answer>`` where the response has one, else
    the whole response; stripped either way. With ``source.extract`` last_number, the last number in
    that text is judged instead (an empty answer where there is none), for models that answer in
    sentences. ``info`` has the answer as judged and which it was (``answer_tags``). Scores are the
    task's own, in [0, 1]: many tasks give partial credit, so "solved" means a reward of 1;
    ``source.partial_credit`` false turns every lower score into 0.
    """

    def __init__(self, source: ReasoningGymSource, field: str = "data.train") -> None:
        self._dataset = make_dataset(source, field)
        self._extract = source.extract
        self._partial_credit = source.partial_credit

    async def judge(self, prompt: Prompt, response_text: str) -> tuple[float, dict[str, Any]]:
        """Score in [0, 1] and ``{"answer": str, "answer_tags": bool}``."""
        tagged = extract_answer(response_text)
        answer = response_text.strip() if tagged is None else tagged.strip()
        if self._extract == "last_number":
            answer = last_number(answer)
        reward = self._dataset.score_answer(answer, entry=prompt.metadata["entry"])
        if reward < 1 and not self._partial_credit:
            reward = 0.0
        return float(reward), {"answer": answer, "answer_tags": tagged is not None}
