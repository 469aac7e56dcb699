"""Programs judged by tests that run them, in a sandbox (sandbox.py)."""

from __future__ import annotations

import ast
import asyncio
import contextlib
import dataclasses
import functools
import json
import os
import re
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megarl.environments import sandbox
from megarl.environments.base import Verifier, VerifierError
from megarl.environments.sandbox_streams import Finished, Limits, SandboxError

if TYPE_CHECKING:
    from megarl.config.environments import CodeConfig
    from megarl.records import Prompt

_BLOCK = re.compile(r"```(?:python|py|python3)?[ \t]*\n(.*?)(?:```|\Z)", re.DOTALL)
_SHOWN = 300

_FOLDER = Path(__file__).parent
_JUDGE_OUTPUT = 1 << 20


class CodeEnvironment(Verifier):
    """Reward: 1 where the response's program passes every test, else 0 (or, asked for, the share passed).

    The program is the response's last fenced block, or all of it; ``metadata["prefix"]`` (what the task has
    given: imports, a head) is put before it. Tests, from the problem's object: ``tests``, Python that raises
    where the program is wrong (one text, or a list of them), run after it; or ``cases``, a list of
    ``{"input": ..., "output": ...}``, each a run with that standard input whose standard output must be the
    same, white space at line ends and at the end aside.

    ``info`` has ``passed``, ``total`` and, where a test failed, how (``outcome``, ``stderr``). A sandbox that
    cannot be made is a failure of the environment, not of the program.
    """

    def __init__(self, config: CodeConfig, field: str = "environment") -> None:
        self._config = config
        self.isolation = sandbox.choose(config.isolation, f"{field}.isolation")
        self.note = f"programs run in a sandbox: {sandbox.describe(self.isolation)}"
        self._limits = Limits(
            wall_seconds=config.timeout_seconds,
            cpu_seconds=max(1, round(config.timeout_seconds)),
            memory_bytes=config.memory_mib << 20,
            disk_bytes=config.disk_mib << 20,
            output_bytes=config.output_kib << 10,
            num_processes=config.num_processes,
        )
        self._judge_limits = dataclasses.replace(
            self._limits,
            wall_seconds=config.total_timeout_seconds,
            cpu_seconds=max(1, round(config.total_timeout_seconds)),
            output_bytes=_JUDGE_OUTPUT,
        )
        self.max_concurrency = config.max_concurrency or len(os.sched_getaffinity(0))

    async def judge(self, prompt: Prompt, response_text: str) -> tuple[float, dict[str, Any]]:
        """Reward in [0, 1]."""
        entry = {**prompt.metadata.get("entry", {}), **prompt.metadata}
        prefix = str(entry.get("prefix", ""))
        program = prefix + "\n" + extract_program(response_text)
        cases, tests = entry.get(self._config.cases_field), entry.get(self._config.tests_field)
        if cases is not None:
            passed, last = await self._run_cases(program, read_cases(cases))
            total = len(read_cases(cases))
        else:
            passed, last = await self._run_tests(program, prefix, read_tests(tests))
            total = len(read_tests(tests))
        info: dict[str, Any] = {"passed": passed, "total": total}
        if passed < total and last is not None:
            info |= {"outcome": last.outcome, "stderr": last.stderr.decode(errors="replace")[-_SHOWN:]}
        if self._config.partial_credit:
            return passed / total, info
        return float(passed == total), info

    async def _run_tests(self, program: str, prefix: str, tests: list[str]) -> tuple[int, Finished]:
        return await asyncio.to_thread(self._judge_tests, program, prefix, tests)

    def _judge_tests(self, program: str, prefix: str, tests: list[str]) -> tuple[int, Finished]:
        """The program in one sandbox, the tests in another, a pipe between them."""
        requests, answers = os.pipe(), os.pipe()
        ended = threading.Event()
        with ThreadPoolExecutor(1) as pool:
            judging = pool.submit(self._run_judge, (answers[0], requests[1]), prefix, tests, ended)
            try:
                files = {"main.py": _text("code_program"), "solution.py": program, **_shared()}
                ran = sandbox.run(
                    sandbox.Program(files, channel=(requests[0], answers[1])),
                    dataclasses.replace(self._limits, wall_seconds=self._judge_limits.wall_seconds),
                    self.isolation,
                    ended,
                )
            finally:
                done = judging.result()
        report = _read_report(done)
        if report["problem"]:
            raise VerifierError(f"the tests cannot be judged: {report['problem']}")
        outcome = ran.outcome if report["outcome"] == "exited" else report["outcome"]
        if outcome == "stopped":  # by us, when the tests were through
            outcome = "exited"
        said = "\n".join([*report["said"], ran.stderr.decode(errors="replace")[-_SHOWN:]]).strip()
        passed = sum(report["passed"]) if outcome == "exited" else 0
        return passed, dataclasses.replace(ran, outcome=outcome, stderr=said.encode())

    def _run_judge(
        self, channel: tuple[int, int], prefix: str, tests: list[str], ended: threading.Event
    ) -> Finished:
        request = {"tests": tests, "prefix": prefix, "seconds": self._config.timeout_seconds}
        files = {"main.py": _text("code_judge"), **_shared()}
        judge = sandbox.Program(files, stdin=json.dumps(request).encode(), channel=channel)
        try:
            return sandbox.run(judge, self._judge_limits, self.isolation)
        finally:
            ended.set()

    async def _run_cases(self, program: str, cases: list[tuple[str, str]]) -> tuple[int, Finished | None]:
        passed, failed, left = 0, None, self._config.total_timeout_seconds
        for given, expected in cases:
            limits = dataclasses.replace(self._limits, wall_seconds=min(self._limits.wall_seconds, left))
            run = sandbox.Program({"main.py": program}, stdin=given.encode())
            done = await asyncio.to_thread(sandbox.run, run, limits, self.isolation)
            left -= done.seconds
            right = done.outcome == "exited" and done.code == 0
            if right and _plain(done.stdout.decode(errors="replace")) == _plain(expected):
                passed += 1
            else:
                failed = done
            if left <= 0 and passed < len(cases):
                failed = dataclasses.replace(done, outcome="timeout")
            if left <= 0 or (failed is not None and not self._config.partial_credit):
                break  # else the reward is 0 whatever the others give
        return passed, failed


@functools.cache
def _text(name: str) -> str:
    return (_FOLDER / f"{name}.py").read_text(encoding="utf-8")


def _shared() -> dict[str, str]:
    return {f"{name}.py": _text(name) for name in ("code_wire", "code_mirror", "code_standard")}


def _read_report(done: Finished) -> dict[str, Any]:
    """Return the report of the judge's process; raise SandboxError if it did not finish."""
    if done.outcome == "exited" and done.code == 0:
        with contextlib.suppress(ValueError):
            report: dict[str, Any] = json.loads(done.stdout)
            return report
    how = f"status {done.code}" if done.outcome == "exited" else done.outcome
    raise SandboxError(
        f"the judge of the tests ended early ({how}): {done.stderr.decode(errors='replace')[-_SHOWN:]}"
    )


def extract_program(text: str) -> str:
    """The last fenced block of a response (one that was cut off counts), or all of it."""
    blocks = _BLOCK.findall(text)
    return str(blocks[-1] if blocks else text)


def read_tests(tests: Any) -> list[str]:
    """Tests as a list. Raises ValueError for anything but text, or texts."""
    found = [tests] if isinstance(tests, str) else tests
    if not isinstance(found, list) or not found or not all(isinstance(test, str) for test in found):
        raise ValueError("tests must be Python text, or a list of texts that is not empty")
    return found


def read_cases(cases: Any) -> list[tuple[str, str]]:
    """Input and output pairs. Raises ValueError where that is not what they are."""
    pairs = [(c.get("input"), c.get("output")) for c in cases] if _are_objects(cases) else []
    if not pairs or not all(isinstance(text, str) for pair in pairs for text in pair):
        raise ValueError('cases must be a list of {"input": text, "output": text} that is not empty')
    return pairs


def check(entry: dict[str, Any], config: CodeConfig) -> str | None:
    """Return what is wrong with a problem's tests; None if nothing is."""
    tests, cases = entry.get(config.tests_field), entry.get(config.cases_field)
    if (tests is None) == (cases is None):
        return f"needs one of the fields {config.tests_field!r} and {config.cases_field!r}"
    try:
        if cases is not None:
            read_cases(cases)
        else:
            for test in read_tests(tests):
                if missing := _missing_library(ast.parse(test, "test")):
                    return f"the tests import {missing}, which the sandbox does not have"
    except (ValueError, SyntaxError, RecursionError, MemoryError) as error:
        return str(error) or type(error).__name__
    return None


def _missing_library(tree: ast.Module) -> str | None:
    """Return a module the tests import from neither the standard library nor the program; None if none."""
    for node in tree.body:
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and not node.level:
            names = [node.module or ""]
        for name in (name.split(".")[0] for name in names):
            if name not in sys.stdlib_module_names and name != "solution":
                return name
    return None


def _are_objects(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(each, dict) for each in value)


def _plain(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().splitlines()]
