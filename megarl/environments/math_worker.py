r"""The process in which math-verify runs; started as a file by :mod:`megarl.environments.math`.

math-verify bounds its run time with SIGALRM, which only the main thread of a process may use; here
it has one. Requests and replies are JSON objects, one per line, on stdin and stdout:

    {"reference": "\\frac{1}{2}", "response": "It is $0.5$."}     response null: only parse the reference
    {"outcome": "equal", "detail": "1/2"}

``outcome`` is one of equal, different, incomparable, unparsed, timeout, bad_reference.
"""

from __future__ import annotations

import functools
import json
import re
import resource
import signal
import sys
from typing import Any

from math_verify import parse, verify
from math_verify.errors import TimeoutException

_TIMEOUT_SECONDS = 5
# An answer such as 9^{9^{9^9}} must run out of memory here, not on the whole machine.
_MEMORY_BYTES = 4 << 30
_MAX_DETAIL = 200
# Delimiters after which math-verify looks for LaTeX by itself.
_LATEX_MARKS = ("$", "\\boxed", "\\(", "\\[")
_INTEGER = re.compile(r"[+-]?\d+")


@functools.lru_cache(maxsize=100_000)
def parse_reference(reference: str) -> tuple[list[Any], str]:
    r"""The reference as sympy objects and "", or nothing and the reason.

    A reference is an expression, not prose: without LaTeX delimiters it is read as if it had them,
    for in plain text math-verify takes ``2^{10}`` for 2 and finds nothing in ``\sqrt{2}``.
    """
    text = reference.strip()
    if not text:
        return [], "it is empty"
    if not _INTEGER.fullmatch(text) and not any(mark in text for mark in _LATEX_MARKS):
        text = f"${text}$"
    try:
        parsed = parse(
            text, fallback_mode="no_fallback", parsing_timeout=_TIMEOUT_SECONDS, raise_on_error=True
        )
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
    try:
        answer = parse(
            response, fallback_mode="no_fallback", parsing_timeout=_TIMEOUT_SECONDS, raise_on_error=True
        )
    except TimeoutException:
        return {"outcome": "timeout", "detail": "parsing the response"}
    except Exception as error:
        return {"outcome": "unparsed", "detail": f"{type(error).__name__}: {error}"[:_MAX_DETAIL]}
    if not answer:
        return {"outcome": "unparsed", "detail": ""}
    try:
        equal = verify(gold, answer, timeout_seconds=_TIMEOUT_SECONDS, raise_on_error=True)
        outcome = "equal" if equal else "different"
    except TimeoutException:
        return {"outcome": "timeout", "detail": "comparing with the reference"}
    except Exception as error:
        return {"outcome": "incomparable", "detail": f"{type(error).__name__}: {error}"[:_MAX_DETAIL]}
    return {"outcome": outcome, "detail": _show(answer[0])}


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
        request = json.loads(line)
        print(json.dumps(judge(request["reference"], request["response"])), flush=True)


if __name__ == "__main__":
    main()
