"""One letter out of several."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from megarl.environments.base import Verifier
from megarl.environments.choice_text import chosen

if TYPE_CHECKING:
    from megarl.config.environments import MultipleChoiceConfig
    from megarl.records import Prompt


class MultipleChoiceEnvironment(Verifier):
    """Reward 1 where the response chooses the reference's letter, else 0.

    The choice is what the response marks as its answer, the last such mark counting: a boxed letter,
    ``<answer>B</answer>``, "answer is (B)", "Answer: B"; where nothing is marked so, "I choose B", "B is the
    answer", a first or last line that is a letter; then "B is right". Without a mark it is the letter that
    begins the response or stands alone in it as "(B)" or "B.": then there must be one such letter only, for
    a response that discusses several has not chosen. LaTeX, Markdown and quotes around a letter say nothing;
    a text behind it ("B. Paris") is its option's; "B or C" is no choice. ``info`` has the ``choice``, None
    where there is none.
    """

    def __init__(self, config: MultipleChoiceConfig) -> None:
        self._letters, self._field = config.choices.upper(), config.choices_field

    async def judge(self, prompt: Prompt, response_text: str) -> tuple[float, dict[str, Any]]:
        """Reward 0 or 1."""
        letters, options = self._allowed(prompt.metadata)
        reference = self.reference(prompt.metadata["answer"], letters)
        choice = chosen(response_text, letters, options)
        return float(choice == reference), {"choice": choice}

    def choice(self, text: str) -> str | None:
        """The letter a response chooses, in upper case."""
        return chosen(text, self._letters)

    def check(self, entry: dict[str, Any], answer: str) -> str | None:
        """What is wrong with a problem's reference, None where nothing is."""
        try:
            self.reference(answer, self._allowed({"entry": entry})[0])
        except ValueError as error:
            return str(error)
        return None

    def _allowed(self, metadata: Any) -> tuple[str, list[str]]:
        """The letters there are, and what they stand for where that is known."""
        if self._field is None:
            return self._letters, []
        choices = metadata.get("entry", metadata).get(self._field)
        if not isinstance(choices, list) or not 0 < len(choices) <= len(self._letters):
            raise ValueError(f"field {self._field!r} is no list of 1 to {len(self._letters)} choices")
        return self._letters[: len(choices)], [str(choice) for choice in choices]

    @staticmethod
    def reference(answer: Any, letters: str) -> str:
        """The reference's letter. Raises ValueError where it is none of ``letters`` and no position."""
        text = str(answer).strip().upper()
        if text.isdigit() and int(text) < len(letters):
            return letters[int(text)]
        if len(text) == 1 and text in letters:
            return text
        raise ValueError(f"{answer!r} is neither one of {letters} nor a position in it counted from 0")
