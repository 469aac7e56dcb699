"""Score mathematical answers with math-verify, which parses both sides and compares expressions."""

from __future__ import annotations

import asyncio
import json
import os
import select
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from megarl.environments.base import Verifier
from megarl.environments.text import last_boxed, last_number
from megarl.errors import UserError

if TYPE_CHECKING:
    from megarl.records import Prompt

_WORKER = Path(__file__).with_name("math_worker.py")
# The worker's own alarms (5 s each) do not fire inside one long C call, e.g. a huge integer power.
_DEADLINE_SECONDS = 30.0
# A limit that was reached with less computing than this share of it says nothing of the response: the process
# was stopped, or the machine was busy.
_COMPUTING = 0.1
_ALARM_SECONDS = 5.0  # the worker's
# Importing sympy on a busy machine is part of the first request.
_START_SECONDS = 120.0


class _Worker:
    """One math-verify subprocess, started at the first request and restarted after it was killed."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None

    def ask(self, reference: str, response: str | None) -> dict[str, Any]:
        """Return the worker's reply (see math_worker.py); outcome "timeout" if it had to be killed.

        Raises:
            RuntimeError: the worker ended by itself, or was held up.
        """
        with self._lock:
            deadline = _DEADLINE_SECONDS
            if self._process is None:
                deadline = _START_SECONDS
                # -P: the worker's folder holds math.py, which must not hide the standard library's.
                self._process = subprocess.Popen(
                    [sys.executable, "-P", str(_WORKER)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
                )
            process = self._process
            assert process.stdin is not None
            assert process.stdout is not None
            request = json.dumps({"reference": reference, "response": response}) + "\n"
            before = _cpu_seconds(process.pid)
            try:
                process.stdin.write(request.encode())
                process.stdin.flush()
                line = _read_line(process.stdout.fileno(), deadline)
            except TimeoutError:
                used = _cpu_seconds(process.pid) - before
                self._stop()
                if used < _COMPUTING * deadline:
                    raise RuntimeError(_held_up(deadline, used)) from None
                return {"outcome": "timeout", "detail": f"killed after {deadline:.0f} s"}
            except BrokenPipeError:
                line = b""
            if not line:
                self._process = None
                raise RuntimeError(f"the math-verify process ended (exit status {process.wait()})")
            reply: dict[str, Any] = json.loads(line)
            if reply["outcome"] == "timeout" and reply["cpu_seconds"] < _COMPUTING * _ALARM_SECONDS:
                raise RuntimeError(_held_up(_ALARM_SECONDS, reply["cpu_seconds"]))
            return reply

    def _stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            for pipe in (self._process.stdin, self._process.stdout):
                if pipe is not None:
                    pipe.close()
            self._process = None

    def close(self) -> None:
        """Kill the process; the next request starts a new one."""
        with self._lock:
            self._stop()


def _cpu_seconds(pid: int) -> float:
    """Return the CPU seconds of a process; 0 if it has exited."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _held_up(seconds: float, used: float) -> str:
    return f"the math-verify process was held up: {used:.1f} s of computing in {seconds:g} s"


def _read_line(descriptor: int, seconds: float) -> bytes:
    """Read one line from an unbuffered descriptor; b"" at its end, TimeoutError after ``seconds``."""
    line = b""
    while not line.endswith(b"\n"):
        ready, _, _ = select.select([descriptor], [], [], seconds)
        if not ready:
            raise TimeoutError
        chunk = os.read(descriptor, 65536)
        if not chunk:
            return b""
        line += chunk
    return line


class MathEnvironment(Verifier):
    """Reward 1 if the response's final expression equals ``prompt.metadata["answer"]``, else 0.

    The reference may be a plain number, also in e notation, or LaTeX, with or without delimiters. In the
    response, after its reasoning (``</think>``), the last box or ``<answer>`` counts; several boxes joined by
    commas or "and" are one answer where the reference is a list. Without one math-verify looks for "final
    answer is", "answer", LaTeX, then plain numbers, the last one first. An equation between numbers that
    differ (18 = 17) is no answer. Decimals are compared to six places, or four digits of a reference near
    zero. ``extract`` boxed or last_number lets it see that part of the response only, and a response
    without one gets 0 (``unparsed``). ``info`` has the parsed answer (``answer``) or why there is none:
    ``unparsed``, ``timeout`` or ``incomparable``, each True with ``detail``. A process that was stopped, or
    got too little of the machine, is an error and no reward.
    """

    def __init__(self, extract: Literal["any", "boxed", "last_number"] = "any") -> None:
        self._extract = extract
        self._worker = _Worker()

    def __getstate__(self) -> dict[str, Any]:
        return {"_extract": self._extract}  # a copy in another process starts its own worker

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._extract = state["_extract"]
        self._worker = _Worker()

    def __copy__(self) -> MathEnvironment:
        episode = MathEnvironment.__new__(MathEnvironment)
        episode._extract, episode._worker = self._extract, self._worker
        return episode

    async def judge(self, prompt: Prompt, response_text: str) -> tuple[float, dict[str, Any]]:
        """Return reward 0 or 1; raise for a reference that cannot be parsed (the loader rejects those)."""
        reference = str(prompt.metadata["answer"])
        if self._extract != "any":
            found = last_boxed(response_text) if self._extract == "boxed" else last_number(response_text)
            if not found:
                return 0.0, {
                    "unparsed": True,
                    "detail": f"no {self._extract.replace('_', ' ')} in the response",
                }
            response_text = f"\\boxed{{{found}}}"
        reply = await asyncio.to_thread(self._worker.ask, reference, response_text)
        outcome, detail = reply["outcome"], reply["detail"]
        if outcome == "bad_reference":
            raise ValueError(f"the reference {reference!r} cannot be parsed: {detail}")
        if outcome in ("equal", "different"):
            return float(outcome == "equal"), {"answer": detail}
        return 0.0, {outcome: True, "detail": detail}

    def close(self) -> None:
        """Kill the worker process; it also exits with this one."""
        self._worker.close()


def check_references(references: Iterable[tuple[str, str]]) -> None:
    """Raise UserError for reference answers that math-verify cannot parse.

    Args:
        references: (where, answer) pairs; ``where`` (file:line: field) begins the error message.

    Raises:
        UserError: at the first that cannot be parsed.
    """
    for _, message in wrong_references(references):
        raise UserError(message)


def wrong_references(references: Iterable[tuple[str, str]]) -> Iterator[tuple[int, str]]:
    """Yield position and reason of every reference answer that math-verify cannot parse."""
    worker = _Worker()
    try:
        for position, (where, reference) in enumerate(references):
            reply = worker.ask(reference, None)
            if reply["outcome"] != "equal":
                reason = f"math-verify cannot use the answer {reference!r}: {reply['detail']}"
                yield position, f"{where}: {reason}"
    finally:
        worker.close()
