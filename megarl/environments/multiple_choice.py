"""Multiple choice: score the letter that a response chooses."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from megarl.environments.base import Verifier
from megarl.environments.choice_text import chosen

if TYPE_CHECKING:
    from megarl.config.environments import MultipleChoiceConfig
    from megarl.records import Prompt


class MultipleChoiceEnvironment(Verifier):
    """Reward 1 if the response chooses the reference's letter, else 0.

    The choice is the last marked answer: a boxed letter, ``<answer>B</answer>``, "answer is (B)", "Answer:
    B"; else "I choose B", "B is the answer", a first or last line that is a letter; else "B is right".
    Without a mark it is a letter that begins the response or stands alone as "(B)" or "B."; there must be
    only one, since a response that discusses several has not chosen. LaTeX, Markdown and quotes around a
    letter are ignored; a text after it ("B. Paris") belongs to its option; "B or C" is not a choice.
    ``info`` has the ``choice`` or None.
    """

    def __init__(self, config: MultipleChoiceConfig) -> None:
        self._letters, self._field = config.choices.upper(), config.choices_field

    async def judge(self, prompt: Prompt, response_text: str) -> tuple[float, dict[str, Any]]:
        """Return reward 0 or 1."""
        letters, options = self._allowed(prompt.metadata)
        reference = self.reference(prompt.metadata["answer"], letters)
        choice = chosen(response_text, letters, options)
        return float(choice == reference), {"choice": choice}

    def choice(self, text: str) -> str | None:
        """Return the letter a response chooses, in upper case, or None."""
        return chosen(text, self._letters)

    def check(self, entry: dict[str, Any], answer: str) -> str | None:
        """Return the error of a reference, or None."""
        try:
            self.reference(answer, self._allowed({"entry": entry})[0])
        except ValueError as error:
            return str(error)
        return None

    def _allowed(self, metadata: Any) -> tuple[str, list[str]]:
        """Return the valid letters, and the texts of their options if known."""
        if self._field is None:
            return self._letters, []
        choices = metadata.get("entry", metadata).get(self._field)
        if not isinstance(choices, list) or not 0 < len(choices) <= len(self._letters):
            raise ValueError(f"field {self._field!r} is no list of 1 to {len(self._letters)} choices")
        return self._letters[: len(choices)], [str(choice) for choice in choices]

    @staticmethod
    def reference(answer: Any, letters: str) -> str:
        """Return the letter of a reference; ValueError if it is neither one of ``letters`` nor an index."""
        text = str(answer).strip().upper()
        if text.isdigit() and int(text) < len(letters):
            return letters[int(text)]
        if len(text) == 1 and text in letters:
            return text
        raise ValueError(f"{answer!r} is neither one of {letters} nor a position in it counted from 0")
