"""One letter out of several."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from megarl.environments.base import Verifier
from megarl.environments.text import last_boxed

if TYPE_CHECKING:
    from megarl.config.environments import MultipleChoiceConfig
    from megarl.records import Prompt


class MultipleChoiceEnvironment(Verifier):
    """Reward 1 where the response chooses the reference's letter, else 0.

    The choice is what the response marks as its answer, the last such mark counting: a boxed letter,
    ``<answer>B</answer>``, "answer is (B)", "Answer: B". Without a mark it is the letter that begins the
    response or stands alone in it as "B", "(B)" or "B.": then there must be one such letter only, for a
    response that discusses several has not chosen. ``info`` has the ``choice``, None where there is none.
    """

    def __init__(self, config: MultipleChoiceConfig) -> None:
        self._letters, self._field = config.choices.upper(), config.choices_field
        letter = f"[{self._letters}{self._letters.lower()}]"
        # A letter is a choice where no word goes on with it: "a" in "a man" is none.
        self._alone = rf"\(?\**({letter})\**\)?(?![\w'])"
        self._marked = re.compile(
            r"(?:<answer>\s*|\banswer\b\s*(?:is|:|=|would be)?\s*:?\s*\**\s*(?:option|choice)?\s*)"
            + self._alone,
            re.IGNORECASE,
        )
        self._bare = re.compile(rf"(?:^|(?<=[\s(*]))\(?\**([{self._letters}])\**(?:\)|\.|:|$|(?=\n))")

    async def judge(self, prompt: Prompt, response_text: str) -> tuple[float, dict[str, Any]]:
        """Reward 0 or 1."""
        letters = self._allowed(prompt.metadata)
        reference = self.reference(prompt.metadata["answer"], letters)
        choice = self.choice(response_text)
        return float(choice == reference), {"choice": choice}

    def choice(self, text: str) -> str | None:
        """The letter a response chooses, in upper case."""
        boxed = re.fullmatch(rf"(?:\\text\{{)?{self._alone}\}}?", last_boxed(text))
        if boxed:
            return boxed[1].upper()
        marked = self._marked.findall(text)
        if marked:
            return str(marked[-1]).upper()
        whole = text.strip().strip("().*: ").upper()
        if len(whole) == 1 and whole in self._letters:
            return whole
        bare = set(self._bare.findall(text))
        return bare.pop() if len(bare) == 1 else None

    def check(self, entry: dict[str, Any], answer: str) -> str | None:
        """What is wrong with a problem's reference, None where nothing is."""
        try:
            self.reference(answer, self._allowed({"entry": entry}))
        except ValueError as error:
            return str(error)
        return None

    def _allowed(self, metadata: Any) -> str:
        if self._field is None:
            return self._letters
        choices = metadata.get("entry", metadata).get(self._field)
        if not isinstance(choices, list) or not 0 < len(choices) <= len(self._letters):
            raise ValueError(f"field {self._field!r} is no list of 1 to {len(self._letters)} choices")
        return self._letters[: len(choices)]

    @staticmethod
    def reference(answer: Any, letters: str) -> str:
        """The reference's letter. Raises ValueError where it is none of ``letters`` and no position."""
        text = str(answer).strip().upper()
        if text.isdigit() and int(text) < len(letters):
            return letters[int(text)]
        if len(text) == 1 and text in letters:
            return text
        raise ValueError(f"{answer!r} is neither one of {letters} nor a position in it counted from 0")
