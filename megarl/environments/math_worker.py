r"""The process in which math-verify runs; started as a file by :mod:`megarl.environments.math`.

math-verify bounds its run time with SIGALRM, which only the main thread of a process may use; here
it has one. Requests and replies are JSON objects, one per line, on stdin and stdout:

    {"reference": "\\frac{1}{2}", "response": "It is $0.5$."}     response null: only parse the reference
    {"outcome": "equal", "detail": "1/2", "cpu_seconds": 0.01}

``outcome`` is one of equal, different, incomparable, unparsed, timeout, bad_reference. ``cpu_seconds`` tells
a request that was hard from one that was held up.
"""

from __future__ import annotations

import functools
import itertools
import json
import re
import resource
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import sympy
from latex2sympy2_extended.latex2sympy2 import NormalizationConfig
from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify
from math_verify.errors import TimeoutException
from math_verify.utils import timeout
from sympy.core.function import AppliedUndef

if not __package__:  # started as a file: the folder that holds the package comes after all others
    sys.path.append(str(Path(__file__).resolve().parents[2]))

from megarl.environments import math_text

_TIMEOUT_SECONDS = 5
# An answer such as 9^{9^{9^9}} must run out of memory here, not on the whole machine.
_MEMORY_BYTES = 4 << 30
_MAX_DETAIL = 200
_INTEGER = re.compile(r"[+-]?\d+")
# math-verify rounds decimals to so many places, and a reference near zero needs more of them.
_DECIMAL_PLACES = 6
_SIGNIFICANT_DIGITS = 4
_PLACES_OF_ZERO = 12
_FLOAT_DIGITS = 14
# How far the two sides of an approximation may be apart.
_ROUNDED_TO_INTEGER = 0.5
_ROUNDED_RELATIVE = 0.05


def _parse(text: str, *, units: bool) -> list[Any]:
    """Return what math-verify parses from a text. With ``units`` it takes them off: "5 m" and "5m" are 5."""
    normalization = NormalizationConfig(
        basic_latex=True, units=units, malformed_operators=True, nits=True, boxed="last", equations=False
    )
    found: list[Any] = parse(
        text,
        [LatexExtractionConfig(normalization_config=normalization), ExprExtractionConfig()],
        fallback_mode="no_fallback",
        parsing_timeout=_TIMEOUT_SECONDS,
        raise_on_error=True,
    )
    return found


@functools.lru_cache(maxsize=100_000)
def parse_reference(reference: str) -> tuple[list[Any], str]:
    """The reference as sympy objects and "", or nothing and the reason."""
    text = reference.strip()
    if not text:
        return [], "it is empty"
    if not _INTEGER.fullmatch(text):
        text = math_text.reference_expression(text)
    try:
        parsed = _parse(text, units=math_text.has_unit(text))
    except TimeoutException:
        return [], f"parsing takes more than {_TIMEOUT_SECONDS} s"
    except Exception as error:
        return [], f"{type(error).__name__}: {error}"
    if not parsed:
        return [], "math-verify finds no expression in it"
    word = _spelled_word(text, parsed[0])
    if word:
        return (
            [],
            f"the word {word!r} would be read as a product of its letters; write it as \\text{{{word}}}",
        )
    return parsed, ""


def _spelled_word(text: str, parsed: Any) -> str | None:
    """A bare word that became a product of one-letter symbols: the answer is text, not mathematics."""
    symbols = {str(symbol) for symbol in getattr(parsed, "free_symbols", ())}
    for word in re.findall(r"(?<![\\{A-Za-z])[A-Za-z]{3,}", text):
        # E and I are read as constants, so they are no free symbols; the letters' case may change.
        if {letter.lower() for letter in word} - {"e", "i"} <= {symbol.lower() for symbol in symbols}:
            return str(word)
    return None


def judge(reference: str, response: str | None) -> dict[str, str]:
    """The reply to one request."""
    gold, reason = parse_reference(reference)
    if not gold:
        return {"outcome": "bad_reference", "detail": reason}
    if response is None:
        return {"outcome": "equal", "detail": ""}
    reading = math_text.read(
        response,
        several=isinstance(gold[0], sympy.Set | sympy.Tuple),
        euler=isinstance(gold[0], sympy.Basic) and gold[0].has(sympy.E),
    )
    replies = []
    for text in reading.answers:
        replies.append(_compare(gold, text))
        if replies[-1]["outcome"] == "equal" and _contradicts_itself(reading):
            return {"outcome": "different", "detail": f"{' = '.join(reading.sides)} does not hold"}
        if replies[-1]["outcome"] in ("equal", "timeout"):
            return replies[-1]
    return replies[0]


def _compare(gold: list[Any], text: str) -> dict[str, str]:
    # A number with a letter behind it is a number with a unit only where the reference has no letters.
    units = not getattr(gold[0], "free_symbols", True)
    try:
        answer = _parse(text, units=units)
    except TimeoutException:
        return {"outcome": "timeout", "detail": "parsing the response"}
    except Exception as error:
        return {"outcome": "unparsed", "detail": f"{type(error).__name__}: {error}"[:_MAX_DETAIL]}
    if not answer:
        return {"outcome": "unparsed", "detail": ""}
    try:
        equal = verify(
            gold,
            answer,
            float_rounding=_decimal_places(gold[0]),
            timeout_seconds=_TIMEOUT_SECONDS,
            raise_on_error=True,
        )
        outcome = "equal" if equal else "different"
    except TimeoutException:
        return {"outcome": "timeout", "detail": "comparing with the reference"}
    except Exception as error:
        return {"outcome": "incomparable", "detail": f"{type(error).__name__}: {error}"[:_MAX_DETAIL]}
    return {"outcome": outcome, "detail": _show(answer[0])}


def _contradicts_itself(reading: math_text.Reading) -> bool:
    """Whether an answer equates numbers that differ: math-verify would take 17 from 18 = 17.

    Decimals may be rounded or cut off: 1/3 = 0.333 is no contradiction.
    """
    numbers = []
    try:
        for side in reading.sides:
            found = _parse(side, units=True)
            if found and _is_number(found[0]):
                numbers.append(found[0])
        return not all(_agree(*pair, reading.rounded) for pair in itertools.pairwise(numbers))
    except (Exception, TimeoutException):  # what cannot be evaluated cannot be shown to be wrong
        return False


def _is_number(expression: Any) -> bool:
    return (
        isinstance(expression, sympy.Expr)
        and not expression.free_symbols
        and not expression.has(AppliedUndef)
    )


@timeout(timeout_seconds=_TIMEOUT_SECONDS)
def _agree(before: Any, after: Any, rounded: bool) -> bool:
    first, second = (sympy.N(side.doit(), 20) for side in (before, after))
    if not (first.is_comparable and second.is_comparable):
        return True  # complex, infinite or undefined: for math-verify to say
    decimals = [number for side in (before, after) for number in side.atoms(sympy.Float)]
    slack = 1.001 * max([_last_place(number) for number in decimals], default=0.0)
    relative = 1e-9
    if rounded:
        slack, relative = max(slack, _ROUNDED_TO_INTEGER), _ROUNDED_RELATIVE
    return bool(abs(first - second) <= max(slack, relative * float(max(abs(first), abs(second)))))


def _last_place(number: Any) -> float:
    """Return the value of one unit in the last decimal place of a written number; 0 if it has none."""
    mantissa, _, exponent = f"{float(number):.12g}".partition("e")
    places = len(mantissa.partition(".")[2]) - int(exponent or 0)
    return float(10.0**-places) if places > 0 else 0.0


def _decimal_places(gold: Any) -> int:
    """To how many places decimals are compared: six, but at least four digits of the reference's smallest
    number, and no more digits of it than a float has (places before the point count negative)."""
    sizes = [abs(sympy.N(number.doit(), 15)) for number in _numbers(gold)]
    sizes = [size for size in sizes if size.is_comparable and size.is_finite]
    if not sizes:
        return _DECIMAL_PLACES
    if min(sizes) == 0:
        return _PLACES_OF_ZERO
    digits_before = int(sympy.floor(sympy.log(min(sizes), 10))) + 1
    return min(max(_DECIMAL_PLACES, _SIGNIFICANT_DIGITS - digits_before), _FLOAT_DIGITS - digits_before)


def _numbers(gold: Any) -> Iterator[Any]:
    """The numbers a reference consists of."""
    if _is_number(gold):
        yield gold
    elif isinstance(gold, sympy.Set | sympy.Tuple | sympy.Eq):
        for part in gold.args:
            yield from _numbers(part)
    elif isinstance(gold, sympy.MatrixBase):
        for part in gold.flat():
            yield from _numbers(part)


def _show(expression: Any) -> str:
    """The parsed answer for people; printing a huge number can itself take for ever."""

    def give_up(signum: int, frame: Any) -> None:
        raise TimeoutError

    signal.signal(signal.SIGALRM, give_up)
    signal.alarm(1)
    try:
        return str(expression)[:_MAX_DETAIL]
    except Exception as error:
        return f"(not printable: {type(error).__name__})"
    finally:
        signal.alarm(0)


def main() -> None:
    """Answer requests until stdin closes, which it does when the parent ends, however it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
    for line in sys.stdin:
        request, start = json.loads(line), time.process_time()
        reply = judge(request["reference"], request["response"])
        print(json.dumps({**reply, "cpu_seconds": time.process_time() - start}), flush=True)


if __name__ == "__main__":
    main()
