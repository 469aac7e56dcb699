"""Programs judged by tests that run them, in a sandbox (sandbox.py)."""

from __future__ import annotations

import asyncio
import json
import os
import re
import secrets
from typing import TYPE_CHECKING, Any

from megarl.environments import sandbox
from megarl.environments.base import Verifier
from megarl.environments.sandbox_streams import Finished, Limits

if TYPE_CHECKING:
    from megarl.config.environments import CodeConfig
    from megarl.records import Prompt

_BLOCK = re.compile(r"```(?:python|py|python3)?[ \t]*\n(.*?)(?:```|\Z)", re.DOTALL)
_SHOWN = 300

# Reads tests and key before the solution runs, and says after each test that it passed: a solution that ends
# the process, or prints what a test would, has passed nothing.
_HARNESS = """\
import os, json


def _run():
    data = b""
    while chunk := os.read(3, 65536):
        data += chunk
    os.close(3)
    request = json.loads(data)
    with open("solution.py") as file:
        source = file.read()
    space = {"__name__": "__main__", "__file__": "solution.py"}
    exec(compile(source, "solution.py", "exec"), space)
    for number, test in enumerate(request["tests"]):
        try:
            exec(compile(test, f"test {number}", "exec"), space)
        except Exception as error:
            os.write(2, f"test {number}: {type(error).__name__}: {error}\\n".encode())
        else:
            os.write(4, f"{request['key']} {number}\\n".encode())


_run()
"""


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
        self.note = f"programs run in a sandbox: {self.isolation}, seccomp, resource limits"
        self._limits = Limits(
            wall_seconds=config.timeout_seconds,
            cpu_seconds=max(1, round(config.timeout_seconds)),
            memory_bytes=config.memory_mib << 20,
            disk_bytes=config.disk_mib << 20,
            output_bytes=config.output_kib << 10,
            num_processes=config.num_processes,
        )
        self.max_concurrency = config.max_concurrency or len(os.sched_getaffinity(0))

    async def judge(self, prompt: Prompt, response_text: str) -> tuple[float, dict[str, Any]]:
        """Reward in [0, 1]."""
        entry = {**prompt.metadata.get("entry", {}), **prompt.metadata}
        program = str(entry.get("prefix", "")) + "\n" + extract_program(response_text)
        cases, tests = entry.get(self._config.cases_field), entry.get(self._config.tests_field)
        if cases is not None:
            passed, last = await self._run_cases(program, read_cases(cases))
            total = len(read_cases(cases))
        else:
            passed, last = await self._run_tests(program, read_tests(tests))
            total = len(read_tests(tests))
        info: dict[str, Any] = {"passed": passed, "total": total}
        if passed < total and last is not None:
            info |= {"outcome": last.outcome, "stderr": last.stderr.decode(errors="replace")[-_SHOWN:]}
        if self._config.partial_credit:
            return passed / total, info
        return float(passed == total), info

    async def _run_tests(self, program: str, tests: list[str]) -> tuple[int, Finished]:
        key = secrets.token_hex(16)
        done = await self._run(
            sandbox.Program(
                {"main.py": _HARNESS, "solution.py": program},
                secret=json.dumps({"key": key, "tests": tests}).encode(),
            )
        )
        lines = {line for line in done.extra.decode(errors="replace").splitlines() if line.startswith(key)}
        passed = sum(f"{key} {number}" in lines for number in range(len(tests)))
        return (passed if done.outcome == "exited" else 0), done

    async def _run_cases(self, program: str, cases: list[tuple[str, str]]) -> tuple[int, Finished | None]:
        passed, failed = 0, None
        for given, expected in cases:
            done = await self._run(sandbox.Program({"main.py": program}, stdin=given.encode()))
            right = done.outcome == "exited" and done.code == 0
            if right and _plain(done.stdout.decode(errors="replace")) == _plain(expected):
                passed += 1
            else:
                failed = done
                if not self._config.partial_credit:
                    break  # the reward is 0 whatever the others give
        return passed, failed

    async def _run(self, program: sandbox.Program) -> Finished:
        return await asyncio.to_thread(sandbox.run, program, self._limits, self.isolation)


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
    """What is wrong with a problem's tests, None where nothing is."""
    tests, cases = entry.get(config.tests_field), entry.get(config.cases_field)
    if (tests is None) == (cases is None):
        return f"needs one of the fields {config.tests_field!r} and {config.cases_field!r}"
    try:
        if cases is not None:
            read_cases(cases)
        else:
            for test in read_tests(tests):
                compile(test, "test", "exec")
    except (ValueError, SyntaxError) as error:
        return str(error)
    return None


def _are_objects(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(each, dict) for each in value)


def _plain(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().splitlines()]
