r"""Normalise mathematics in responses to LaTeX that math-verify parses.

math-verify takes text apart by itself. What it would take for something else is put right first: numbers in e
notation (1e-05 would be e - 5), signs of Unicode (its minus would be lost), thousands separators, functions
without a backslash, and which of several boxes counts (it joins boxes that stand close together to a set).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from decimal import Decimal

from megarl.environments.text import after_reasoning, boxes, number_text, without_e_notation

_SIGNS = {
    "\u2212": "-",
    "\ufe63": "-",
    "\uff0d": "-",
    "\u00d7": r"\times ",
    "\u22c5": r"\cdot ",
    "\u00b7": r"\cdot ",
    "\u00f7": "/",
    "\u2215": "/",
    "\u2044": "/",
    "\u2264": r"\le ",
    "\u2265": r"\ge ",
    "\u2260": r"\ne ",
    "\u2248": r"\approx ",
    "\u00b1": r"\pm ",
    "\u221e": r"\infty ",
    "\u222a": r"\cup ",
    "\u2229": r"\cap ",
    "\u2205": r"\emptyset ",
    "\u2208": r"\in ",
    "\u03c0": r"\pi ",
    "\u03b8": r"\theta ",
    "\u03b1": r"\alpha ",
    "\u03b2": r"\beta ",
    "\u03bb": r"\lambda ",
    "\u00b0": r"^{\circ}",
    "\u00bc": r"\frac{1}{4}",
    "\u00bd": r"\frac{1}{2}",
    "\u00be": r"\frac{3}{4}",
    "\u2153": r"\frac{1}{3}",
    "\u2154": r"\frac{2}{3}",
    "\u00b2": "^{2}",
    "\u00b3": "^{3}",
    "\u2074": "^{4}",
    "\u2075": "^{5}",
    "\u207f": "^{n}",
}
# Full-width forms of ASCII are written beside Chinese and Japanese text.
_TRANSLATION = str.maketrans(_SIGNS | {chr(0xFF01 + i): chr(0x21 + i) for i in range(94)} | {"\u3002": "."})
_PLAIN_MINUS = str.maketrans("\u2212\ufe63\uff0d", "---")

_ROOT = re.compile(r"\u221a\s*(?:\(([^()]*)\)|\{([^{}]*)\}|(\d+(?:\.\d+)?|[A-Za-z]))")
_SPACED_THOUSANDS = re.compile(
    r"(?<![\d.,])(\d{1,3})((?:(?:\\[,!;: ]|\{,\}|[~ \u00a0\u2009\u202f])\d{3})+)(?!\d)"
)
_FUNCTION = re.compile(
    r"(?<![\\A-Za-z])(sqrt|sin|cos|tan|cot|sec|csc|arcsin|arccos|arctan|ln|log|exp)(?=\s*[({^_\d])"
)
_NAMED = re.compile(r"(?<![\\A-Za-z])(pi|infty|infinity)(?![A-Za-z])")
_LONG_EXPONENT = re.compile(r"([\^_])(-?\d+(?:\.\d+)?|-[A-Za-z])(?![\d}])")
_DELIMITED = re.compile(r"(\$\$?|\\\(|\\\[)(.{1,2000}?)(\$\$?|\\\)|\\\])", re.DOTALL)
_WORDS = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{2,}")
_KNOWN_WORDS = frozenset(
    ("sqrt", "pi", "sin", "cos", "tan", "cot", "sec", "csc", "ln", "log", "exp", "or", "and")
)
_LONGEST_BARE = 200  # characters of a response that is taken for one expression
_TAG = re.compile(r"<answer>(.*?)</answer>", re.DOTALL | re.IGNORECASE)
_FINAL = re.compile(r"final answer.{0,100}?\s+is\b", re.DOTALL | re.IGNORECASE)
# What stands between boxes that are one answer together.
_JOIN = re.compile(r"(?:\s|\$|\\[()\[\]]|,|;|\\text\s*\{|\}|\band\b|\bor\b|\\quad|\*)*", re.IGNORECASE)
# Only after these words: "3 and 5 = 4" after "the average of" is the end of a side.
_NUMERALS_AT_END = re.compile(
    r"(?:^|[:*]|\b(?:so|thus|hence|therefore|then|is|get|have|gives|since|because|that|answer)\b[,:]?)\s*"
    r"([-(\d.][-+\d.,*/^()%=\s]*)$",
    re.IGNORECASE,
)
_EQUALS = r"(?<![<>!\\:])=(?!=)|\\(?:approx|simeq|doteq|cong|equiv)(?![A-Za-z])"
_UNIT_COMMAND = (
    r"(?:\\[,;: ]|~|\s)*\\(?:text|mathrm|mbox|textrm)\s*"
    r"\{\s*(?![iejdT]\s*\})[A-Za-z/ .]+(?:\^\{?-?\d\}?)?\s*\}"  # \mathrm{i} and others are no units
)
_UNIT_AT_END = re.compile(r"(?<=[\w)}])" + _UNIT_COMMAND + r"(?:\s*\^\s*\{?-?\d\}?)?(?=\s*$)")
_AMOUNT = r"[-+]?(?:[\d.,]*\d|\\frac\{\d+\}\{\d+\})"
_RATE = r"(?:[kcm]?m|mi|ft|k?g|mg|L|k?J)/(?:s\^?\{?2?\}?|h|hr|min|mol|L|m|kg)"
_WITH_UNIT = re.compile(
    rf"{_AMOUNT}(?:\s+(?:[A-Za-z]{{2,}}[A-Za-z/ ]*|[mgslh])|{_UNIT_COMMAND}.*)", re.DOTALL
)
_WITH_WORDS = re.compile(rf"(?<![\d.,])({_AMOUNT})\s+([A-Za-z]{{3,}}(?: [A-Za-z]+)*|{_RATE})")
_UPRIGHT = re.compile(r"\\(?:math|text)?rm\s*\{\s*([iedj])\s*\}")
_SCIENTIFIC = re.compile(
    r"(?<![\w.\\^_}])(\d+(?:\.\d+)?)\s*(?:\\times|\\cdot|\*)\s*"
    r"10\s*\^\s*(?:\{\s*(?=[-+\d\s]*\}))?([-+]?\d{1,3})(?:\s*\})?(?!\d)"
)
# A product or quotient in prose, and what makes it one that math-verify cannot read: "2\u03c0", "3*sqrt(2)".
_ATOM = (
    r"(?:\d++(?:\.\d++)?|\u221a\s*(?:\([^()]*\)|\d++)|sqrt\([^()]*\)"
    r"|\u03c0|(?<![A-Za-z])pi(?![A-Za-z])|[-+*/^()])"
)
_SYMBOLIC = re.compile(rf"(?<![\w.$\\]){_ATOM}(?:\s?{_ATOM}){{0,60}}+(?![\w$])")
_SYMBOL = re.compile(r"[\u221a\u03c0]|sqrt|pi")
_POWERS = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}
_COUNTED = re.compile(rf"(?<![\w.,])(\d[\d,]*(?:\.\d+)?)\s+({'|'.join(_POWERS)})\b", re.IGNORECASE)

# Delimiters after which math-verify looks for LaTeX by itself.
LATEX_MARKS = ("$", "\\boxed", "\\(", "\\[")


def latex(expression: str, *, euler: bool = False) -> str:
    """Convert one expression, without delimiters, to LaTeX that math-verify parses correctly.

    ``euler``: the e in 2e-5 may be Euler's number, so it is left alone.
    """
    text = _ROOT.sub(lambda found: rf"\sqrt{{{found[1] or found[2] or found[3]}}}", expression)
    text = text.translate(_PLAIN_MINUS)
    text = (text if euler else in_digits(text)).translate(_TRANSLATION)
    text = _SPACED_THOUSANDS.sub(lambda found: found[1] + re.sub(r"\D", "", found[2]), text)
    text = text.replace("~", " ").replace("\\varnothing", "\\emptyset").replace("\\degree", "^{\\circ}")
    text = re.sub(r"(?<=[\d)}])i(?![A-Za-z])", " i", _UPRIGHT.sub(r" \1", text))  # 3i is no variable 3 * i
    text = _UNIT_AT_END.sub("", text.replace("**", "^"))
    text = _FUNCTION.sub(r"\\\1", text)
    text = re.sub(r"\\sqrt\s*\(([^()]*)\)", r"\\sqrt{\1}", text)
    text = _NAMED.sub(lambda found: r"\pi " if found[1] == "pi" else r"\infty ", text)
    text = _SCIENTIFIC.sub(lambda found: number_text(Decimal(f"{found[1]}e{found[2]}")), text)
    text = _LONG_EXPONENT.sub(r"\1{\2}", text)
    return re.sub(r"(?<=[\w)}])\s*\*\s*(?=[\w({\\])", r" \\cdot ", text).strip()


def in_digits(text: str) -> str:
    """Write out numbers in E notation and with a power of ten as a word (1.5 million) in digits."""

    def multiplied(found: re.Match[str]) -> str:
        return number_text(Decimal(found[1].replace(",", "")) * 10 ** _POWERS[found[2].lower()])

    return _COUNTED.sub(multiplied, without_e_notation(text))


def reference_expression(reference: str) -> str:
    r"""Convert a reference to text for math-verify: in delimiters, since it is an expression, not prose.

    In plain text math-verify takes ``2^{10}`` for 2 and finds nothing in ``\sqrt{2}``.
    """
    text = reference.strip()
    found = boxes(text)
    if found:
        text = found[-1][2]
    text = re.sub(r"^\\?\$(?=[\d.])(?!.*\$)", "", text)  # a price
    if any(mark in text for mark in LATEX_MARKS):
        return _DELIMITED.sub(lambda part: part[1] + latex(part[2]) + part[3], text)
    return f"${latex(text).rstrip('.')}$"


@dataclass(frozen=True)
class Reading:
    """The part of a response to compare: texts for math-verify, one of which must be correct.

    ``sides`` are those of the equation that the answer is, if it is one; ``rounded`` where it is an
    approximation.
    """

    answers: list[str]
    sides: list[str]
    rounded: bool


def read(response: str, *, several: bool, euler: bool) -> Reading:
    """Find the answer of a response.

    Args:
        response: the model's text.
        several: the reference is a list or a set, so boxes beside each other may be one answer together.
        euler: the reference has Euler's number; see :func:`latex`.
    """
    text = after_reasoning(response)
    tags = [(found.start(), found.end(), found[1].strip()) for found in _TAG.finditer(text)]
    marked = sorted([*boxes(text), *(tag for tag in tags if tag[2])])
    if marked and any(found.start() >= marked[-1][1] for found in _FINAL.finditer(text)):
        text, marked = text[marked[-1][1] :], []
    if not marked:
        return _prose(text, euler)
    start, end, content = marked[-1]
    if text[start] == "<" and not is_expression(content):
        return _prose(content, euler)
    if re.match(r"\$?\s*(?:\\?%|percent)", text[end:]):
        content += "\\%"
    together = [content]
    if several:
        for before, after in zip(marked[-2::-1], marked[:0:-1], strict=True):
            if not _JOIN.fullmatch(text[before[1] : after[0]]):
                break
            together.insert(0, before[2])
    return _expression([content, ", ".join(together)][: min(len(together), 2)], euler)


def _expression(contents: list[str], euler: bool) -> Reading:
    """Read contents that are expressions; the first alone is the answer."""
    plain = [_without_words(content.strip().rstrip(".,;").strip("$").strip()) for content in contents]
    answers = [f"${part}$" for each in plain for part in _both_sides(latex(each, euler=euler))]
    sides, rounded = _equation(plain[0])
    return Reading(answers + _turned(sides), sides, rounded)


def _prose(text: str, euler: bool) -> Reading:
    """Read a response without marked answer: math-verify searches it."""
    text = text.translate(_PLAIN_MINUS)
    plain = text.strip().strip("*_`\"' ").rstrip(".")
    delimited = any(mark in plain for mark in LATEX_MARKS)
    if not delimited:
        equation = plain_equation(text)
        if equation or is_expression(plain):
            return _expression([equation or plain], euler)
        text = _SYMBOLIC.sub(
            lambda found: f" ${found[0].strip()}$ " if _SYMBOL.search(found[0]) else found[0], text
        )
    text = text if euler else in_digits(text)
    parts = list(_DELIMITED.finditer(text))
    text = _DELIMITED.sub(lambda found: found[1] + latex(found[2], euler=euler) + found[3], text)
    answers = [text]
    if parts and "\\approx" in (last := latex(parts[-1][2], euler=euler)):
        answers += [f"${side}$" for side in _both_sides(last)]
    sides, rounded = _equation(parts[-1][2] if parts else "")
    return Reading(answers + _turned(sides), sides, rounded)


def _turned(sides: list[str]) -> list[str]:
    """Return the value of "17 = x", where math-verify would take the right-hand side."""
    return [sides[0]] if len(sides) == 2 and re.fullmatch(r"\$\s*[A-Za-z]\s*\$", sides[1]) else []


def _both_sides(expression: str) -> list[str]:
    r"""Return the expression, or both sides of its last ``\approx``, where math-verify stops."""
    left, sign, right = expression.rpartition("\\approx")
    return [left, right] if sign else [right]


def _equation(expression: str) -> tuple[list[str], bool]:
    """Return the sides of an equation ([] if it is not one or has units), and whether it is approximate."""
    if re.search(r"[,;]|\\(?:text|mathrm|mbox|circ|bmod|pmod|mod)(?![A-Za-z])", expression):
        return [], False
    if _WITH_WORDS.search(expression):
        return [], False
    text = latex(expression)
    sides, start, depth = [], 0, 0
    for found in re.finditer(rf"\\[{{}}]|[{{}}]|{_EQUALS}", text):
        if found[0] in "{}":
            depth += 1 if found[0] == "{" else -1
        elif depth == 0 and not found[0].startswith(("\\{", "\\}")):
            sides.append(text[start : found.start()])
            start = found.end()
    sides = [f"${side}$" for side in (*sides, text[start:])]
    return (sides if len(sides) > 1 else []), re.search(r"\\(?:approx|simeq|doteq|cong)", text) is not None


def _without_words(content: str) -> str:
    """Return the number in "36 apples"."""
    counted = _WITH_WORDS.fullmatch(content)
    if counted and counted[2].split()[0].lower() not in _KNOWN_WORDS | _POWERS.keys() | {"percent"}:
        return counted[1]
    return content


def is_expression(text: str) -> bool:
    """Return whether a text is one short expression, not prose."""
    if not text or len(text) > _LONGEST_BARE or re.search(r"\n|\d\s+\d", text.strip()):
        return False
    words = (word.lower() for word in _WORDS.findall(text))
    return all(word in _KNOWN_WORDS for word in words) and re.search(r"[\w\u221a]", text) is not None


def plain_equation(text: str) -> str | None:
    """Return the equation of numerals at the end of a text, e.g. "18 = 17"; None without one."""
    line = text.strip().rpartition("\n")[2].rstrip(".!* ")[-_LONGEST_BARE:]
    found = _NUMERALS_AT_END.search(line)
    if (
        found is None
        or not all(re.search(r"\d", side) for side in found[1].split("="))
        or "=" not in found[1]
    ):
        return None
    return found[1]


def has_unit(expression: str) -> bool:
    r"""Return whether it is a number with a unit: "5 cm", "5\text{ m}"; "4t" and "2 x" are algebra."""
    return _WITH_UNIT.fullmatch(expression.strip().strip("$").strip()) is not None
