"""Extract the chosen letter from a response, in the usual forms."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from megarl.environments.text import after_reasoning, boxes

# LaTeX, Markdown and HTML around a letter are ignored.
_WRAPPED = re.compile(
    r"\\(?:text(?:bf|it|rm|sf|tt)?|math(?:rm|bf|it|sf|tt|bb|cal)?|boldsymbol|bm|operatorname|mbox|underline)"
    r"\s*\{([^{}]*)\}"
)
_SPACE = re.compile(r"\\[,;:! ]|\\q?quad\b|~|&nbsp;")
_NOISE = re.compile(
    r"\\[()\[\]]|\\(?:left|right|big|Big|displaystyle|rm|bf)\b\s*|[$*`\"\u201c\u201d\u00ab\u00bb]"
    r"|<\|[^|<>]*\|>|</?(?:s|b|strong|i|em|u|p|span|code)\s*/?>"
    r"|(?m:^[ \t]*[#>]+[ \t]*)|(?<![A-Za-z0-9])_+|_+(?![A-Za-z0-9])"
)
_QUOTED = re.compile(r"['\u2018\u2019](\(?[A-Za-z]\)?[.:]?)['\u2018\u2019]")
_TAG = re.compile(r"<(answer|choice|option|final_answer)>(.*?)</\1>", re.DOTALL | re.IGNORECASE)

_ONE = r"[(\[]?[A-Z][)\]]?"
_LETTER = re.compile(r"[\s(\[{<]*([A-Za-z])[)\]}>]*")
_KIND = (
    r"(?:(?:the|my|an?)\s+)?(?:(?:correct|final|best)\s+)?"
    r"(?:option|choice|letter|answer|statement|alternative)\b\s*[:#]?\s*"
)
_ADVERB = (
    r"(?:(?:clearly|definitely|certainly|obviously|probably|likely|most\s+likely|simply|actually|indeed|still"
    r"|therefore|thus|hence|then|just|in\s+fact|only|instead|again|rather)\b,?\s*)*"
)
_SEPARATOR = (
    r"(?:\s*(?:\b(?:is|was|(?:would|should|must|will|has\s+to)\s+be)\b"
    r"|[:=\u2192\u21d2\u2013\u2014]|->|=>|-|\n))+\s*"
)
_ANSWER = re.compile(
    rf"\b(?P<noun>answer|ans|choice|option|alternative|selection|letter)\b\.?"
    rf"(?P<between>(?:(?!\b(?:answer|option|choice)\b)[^.:=\n?!\u2192]){{0,60}}?)"
    rf"{_SEPARATOR}{_ADVERB}(?:not\s+(?:{_KIND})?\(?[A-Za-z]\)?,?\s*but\s+(?:rather\s+)?)?"
    rf"(?:{_KIND})?(?=[(\[{{<\s]*\w)",
    re.IGNORECASE,
)
_BEFORE_NO_ANSWER = re.compile(
    r"\b(?:if|whether|suppos(?:e|ing)|assum(?:e|ing)|imagine|wrong|incorrect|false|other|another|bad)\s+"
    r"(?:that\s+)?(?:(?:the|an?|my|your)\s+)?(?:(?:correct|right|final|best)\s+)?$",
    re.IGNORECASE,
)
_NEGATION = re.compile(r"\b(?:not|never|neither|nor|cannot|no)\b|n't\b|n\u2019t\b", re.IGNORECASE)
_TAKES = re.compile(
    r"\b(?:choos(?:e|ing)|chose|pick(?:ed|ing)?|select(?:ed|ing)?|(?:go|going|went)\s+(?:with|for)"
    r"|settled?\s+(?:on|for)|opt(?:ed)?\s+for|vote\s+for|lean(?:ing)?\s+towards?|think|believe"
    r"|guess(?:ing)?|say|leav(?:es|ing)|match(?:es)?"
    r"|correspond(?:s|ing)\s+to|it(?:\s+is|'s|\u2019s|\s+must\s+be|\s+has\s+to\s+be)|which\s+is|that\s+is"
    r"|so|thus|hence|therefore|conclu(?:de|sion))\b[,:]?\s*(?:that\s+)?(?:it(?:\s+is|'s|\u2019s|\s+must\s+be)\s+)?"
    rf"{_ADVERB}(?:us\s+with\s+|with\s+)?(?:{_KIND})?(?=[(\[{{<\s]*[A-Za-z])",
    re.IGNORECASE,
)
_RIGHT = re.compile(
    rf"(?P<kind>{_KIND})?[(\[]?(?P<letter>(?<![A-Za-z0-9'\u2019-])[A-Za-z])[)\]]?[.:]?\s*,?\s*"
    rf"\b(?:is|was|must\s+be|would\s+be|seems|appears|looks)\b\s*(?:to\s+be\s+)?{_ADVERB}"
    r"(?:(?:the|my|our)\s+)?(?:(?:most|only|best|single)\s+)?"
    r"(?P<what>(?:final\s+|correct\s+|right\s+|best\s+)*(?:answer|choice|option)"
    r"|correct|right|true|best|accurate|appropriate)\b",
    re.IGNORECASE,
)
_JOINED = re.compile(
    r"\s*(?:,?\s*(?:and/or|and|or)\b|[,/&+])\s*"
    r"(?:(?:both|either|maybe|perhaps|possibly|probably|also|even)\b)?\s*(?:option|choice)?\s*",
    re.IGNORECASE,
)
_SUBJECT = re.compile(
    r"\s*(?:is|are|was|were|has|have|does|do|can|cannot|could|would|will|says?|may|might|must|should"
    r"|fails?|seems?)\b",
    re.IGNORECASE,
)
# "A because", "a since": words that do not follow an article.
_GOES_ON = re.compile(
    r"\s+(?:because|since|as|and|or|but|for|which|so|is|was|are|due|by|not|here|given|from|when|with|in"
    r"|based|it|this|that|if|the)\b",
    re.IGNORECASE,
)
_BARE = re.compile(
    r"(?m:(?:^[ \t]*|(?<=[.:;!?\u2014\u2013-][ \t])|(?=\())\(?([A-Za-z])(?:\)|\.(?!\w)|:|[ \t]*$))"
)
_LINE = re.compile(rf"(?:{_KIND})?[(\[]*([A-Za-z])[)\]]*[.:]?", re.IGNORECASE)
_BEGINS = re.compile(r"\s*([(\[]*(?!I,)[A-Z][)\]]*)\s*[-,\u2013\u2014]\s")  # "B - Paris"
_NONE = re.compile(r"\banswer\b\s*(?:is|[:=])\s*(?:none|neither|not|no)\b", re.IGNORECASE)


@dataclass(frozen=True)
class _Mark:
    """A position that marks the choice; ``letter`` None: several letters, or not a valid one."""

    position: int
    letter: str | None


def chosen(text: str, letters: str, options: Sequence[str] = ()) -> str | None:
    """Return the letter that a response chooses, in upper case; None if it chooses none or several.

    Args:
        text: the response.
        letters: the valid letters, in upper case.
        options: the texts of the letters; an option's text as the answer counts as its letter.
    """
    said = after_reasoning(text)
    reader = _Reader(unicodedata.normalize("NFKC", said), letters, options)
    for marks in (reader.answers(), reader.conclusions(), reader.called_right()):
        found = sorted(marks, key=lambda mark: mark.position)
        if found:
            return found[-1].letter
    return None if reader.has_other_answer else reader.bare()


class _Reader:
    def __init__(self, text: str, letters: str, options: Sequence[str]) -> None:
        self._letters = letters
        self._options = [_comparable(option) for option in options]
        self._held: list[tuple[int, str]] = []
        parts: list[str] = []
        position = 0
        tags = [(found.start(), found.end(), found[2]) for found in _TAG.finditer(text)]
        for start, end, content in sorted([*boxes(text), *tags]):
            if start < position:  # a box in a tag
                parts[-1] = ""
                self._held.pop()
            else:
                parts.append(_plain(text[position:start]))
            self._held.append((sum(map(len, parts)), content))
            position = end
        # The content of boxes is removed from the text and read separately.
        self._text = "".join(parts) + _plain(text[position:])
        self.has_other_answer = _NONE.search(self._text) is not None

    def answers(self) -> Iterator[_Mark]:
        """Yield marks of boxes, tags and "the answer is B"."""
        for position, content in self._held:
            mark = self._content(position, _plain(content).strip())
            if mark is None:
                self.has_other_answer = True
            else:
                yield mark
        for found in _overlapping(_ANSWER, self._text):
            between = found["between"]
            if _NEGATION.search(between) or _BEFORE_NO_ANSWER.search(self._text[: found.start()][-60:]):
                continue
            if found["noun"].lower() != "answer" and re.search(r"\b[A-Za-z]\b", between):
                continue  # "Option A: B cells" describes one
            mark = self._letters_at(
                found.end(), after_colon=not found[0].rstrip().lower().endswith(("is", "be"))
            )
            if mark is None and self._options:
                mark = self._option(found.start(), self._text[found.end() :].partition("\n")[0])
            if mark is not None:
                yield mark

    def conclusions(self) -> Iterator[_Mark]:
        """Yield marks of a line that is a letter, "I choose B", "B is the answer", "so B."."""
        lines = list(re.finditer(r"[^\n]*\S[^\n]*", self._text))
        for line in (lines[0], lines[-1]) if lines else ():
            alone = _LINE.fullmatch(line[0].strip())
            if alone and alone[1].upper() in self._letters:
                yield _Mark(line.start(), alone[1].upper())
        begins = _BEGINS.match(self._text)
        if begins and (mark := self._letters_at(begins.start(1), after_colon=True)) is not None:
            yield _Mark(0, mark.letter)
        for found in _TAKES.finditer(self._text):
            mark = self._letters_at(found.end(), after_colon=True, ends=True)
            clause = re.split(r"[.,;:\n]", self._text[max(found.start() - 12, 0) : found.start()])[-1]
            if mark is not None and not _NEGATION.search(clause):
                yield mark
        yield from self._right(answers=True)

    def called_right(self) -> Iterator[_Mark]:
        """Yield marks of "C is right"."""
        return self._right(answers=False)

    def _right(self, *, answers: bool) -> Iterator[_Mark]:
        for found in _RIGHT.finditer(self._text):
            letter = found["letter"]
            named = found["kind"] is not None or letter.isupper()
            is_answer = found["what"].split()[-1].lower() in ("answer", "choice", "option")
            asked = self._text[found.end() :].lstrip().startswith("?")
            if named and is_answer == answers and letter.upper() in self._letters and not asked:
                yield _Mark(found.start(), letter.upper())

    def bare(self) -> str | None:
        """Return the only letter that stands alone, or None."""
        found = {match[1] for match in _BARE.finditer(self._text) if match[1] in self._letters}
        return found.pop() if len(found) == 1 else None

    def _content(self, position: int, content: str) -> _Mark | None:
        """Read a box or tag: a letter, alone or before its option's text."""
        match = re.match(rf"(?:.*?\banswer\b{_SEPARATOR})?(?:{_KIND})?", content, re.IGNORECASE | re.DOTALL)
        start = match.end() if match else 0
        mark = self._letters_in(content, start, position, after_colon=True, ends=False)
        if mark is None:
            return self._option(position, content)
        if re.fullmatch(rf"{_ONE}(?:[\s,;/&]+{_ONE})+", content[start:].strip()):
            return _Mark(position, None)  # "B C"
        return mark

    def _option(self, position: int, content: str) -> _Mark | None:
        text = _comparable(content)
        same = [
            letter for letter, option in zip(self._letters, self._options, strict=False) if option == text
        ]
        return _Mark(position, same[0]) if text and len(same) == 1 else None

    def _letters_at(self, start: int, *, after_colon: bool, ends: bool = False) -> _Mark | None:
        return self._letters_in(self._text, start, start, after_colon=after_colon, ends=ends)

    def _letters_in(
        self, text: str, start: int, position: int, *, after_colon: bool, ends: bool
    ) -> _Mark | None:
        """Return the mark of the letter at ``start`` (letter None if joined with others); None for a word.

        ``ends``: the letter must end the clause.
        """
        match = self._letter(text, start, after_colon)
        if match is None:
            return None
        found, end = {match[1].upper()}, match.end()
        position_after = end
        while joined := _JOINED.match(text, end):
            other = self._letter(text, joined.end(), after_colon=True)
            if other is None:
                break
            if _SUBJECT.match(text, other.end()):  # "B, and A and C are wrong"
                found, end = {match[1].upper()}, position_after
                break
            found.add(other[1].upper())
            end = other.end()
        rest = text[end:]
        if rest.lstrip().startswith("?"):
            return None
        if ends and not re.match(r"\s*(?:[.,;!:)]|\n|$|\u2014|\u2013|because|since|as\b|here)", rest):
            return None
        if len(found) > 1:
            return _Mark(position, None)
        [letter] = found
        if letter in self._letters:
            return _Mark(position, letter)
        plain = match[1].isupper() and re.match(r"\s*(?:[.,;)]|\n|$)", rest)
        return _Mark(position, None) if plain else None

    def _letter(self, text: str, start: int, after_colon: bool) -> re.Match[str] | None:
        """Match a letter that is a choice, not a word, article, pronoun or variable."""
        match = _LETTER.match(text, start)
        if match is None:
            return None
        if re.match(r"\w|['\u2019]\w|-\w|\.[a-z]\b|\s*[=^<>#]|\+\+|\s*[+*]\s*\d", text[match.end() :]):
            return None
        enclosed = match[0].rstrip()[-1] in ")]}>"
        if match[1] in "aAiI" and not enclosed and re.match(r"\s+[A-Za-z]", text[match.end() :]):
            goes_on = _GOES_ON.match(text, match.end()) is not None
            if not goes_on and (match[1].islower() or after_colon or match[1] == "I"):
                return None
        return match


def _overlapping(pattern: re.Pattern[str], text: str) -> Iterator[re.Match[str]]:
    """Yield overlapping matches: "Answer: the correct option is B"."""
    found = pattern.search(text)
    while found is not None:
        yield found
        found = pattern.search(text, found.start() + 1)


def _plain(text: str) -> str:
    """Remove formatting from a text."""
    before = None
    while before != text:
        before, text = text, _WRAPPED.sub(r"\1", text)
    text = _NOISE.sub("", _SPACE.sub(" ", text))
    return _QUOTED.sub(r"\1", text).replace("\\", "")


def _comparable(option: str) -> str:
    return " ".join(re.sub(r"[^\w.+/%-]+", " ", _plain(option).casefold()).strip(" .").split())
