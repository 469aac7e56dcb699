"""Tests judged outside of the program's process: right answers earn 1, and what cheats earns nothing."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megarl.config.environments import CodeConfig
from megarl.environments import VerifierError, grade, make_environment, sandbox
from megarl.errors import UserError
from megarl.records import Prompt
from tests.environments.judged_programs import CHEATS, RIGHT

# Those that earned the reward when the tests ran in the program's process, and one of each kind since.
CHEATS_ALWAYS_RUN = (
    "exec replaced",
    "always equal",
    "a class that is near everything",
    "the callback's globals",
    "its own memory",
    "an object's insides",
    "a skipped test",
    "ended in an expected failure",
    "an answer sent before the question",
    "a float that rounds as wanted",
)
PLAIN_PYTHON = "/usr/bin/python3.11"
RIGHT_ALWAYS_RUN = (
    "a list sorted in place",
    "classes",
    "callbacks",
    "generators",
    "exceptions of its own",
    "what the task has given",
    "printing and reading",
    "the module solution",
    "threads",
    "a builtin's name",
)


_OTHERS = [pytest.param(name, marks=pytest.mark.slow) for name in ("bubblewrap", "landlock")]


@pytest.fixture(scope="module", params=["auto", *_OTHERS])
def judge(request: pytest.FixtureRequest) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "landlock" and os.geteuid() == 0:  # a Python that nobody can reach
            if not os.path.exists(PLAIN_PYTHON):
                pytest.skip("no Python outside root's home")
            patch.setattr(sandbox, "python_path", lambda: PLAIN_PYTHON)
            paths = [path for path in sandbox._SYSTEM_PATHS if os.path.exists(path)]
            patch.setattr(sandbox, "visible_paths", lambda: paths)
        try:
            isolation = sandbox.choose.__wrapped__(request.param)
        except UserError as error:
            pytest.skip(str(error))
        config = CodeConfig(kind="code", timeout_seconds=20.0, isolation=isolation)
        yield _judge(make_environment(config, "e"))


def _judge(environment: Any) -> Any:
    def judged(program: str, tests: Any, prefix: str = "") -> Any:
        prompt = Prompt(0, "p", [1], {"entry": {"tests": tests}, "prefix": prefix})
        return asyncio.run(grade(environment, prompt, f"```python\n{program}\n```"))

    return judged


ONE_PROCESS = """
import sys, types
program, test = sys.stdin.read().split("\\0\\0")
module = sys.modules["solution"] = types.ModuleType("solution")
exec(compile(program, "solution.py", "exec"), module.__dict__)
exec(compile(test, "test", "exec"), module.__dict__)
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", RIGHT)
def test_what_is_right_is_right_in_one_process_too(name: str, tmp_path: Path):
    prefix, program, tests = RIGHT[name]
    text = f"{prefix}\n{program}\0\0{tests}".encode()
    done = subprocess.run(
        [sys.executable, "-c", ONE_PROCESS], input=text, capture_output=True, check=False, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr.decode()


@pytest.mark.parametrize(
    "name", [n if n in RIGHT_ALWAYS_RUN else pytest.param(n, marks=pytest.mark.slow) for n in RIGHT]
)
def test_right_programs_earn_the_reward(judge: Any, name: str):
    prefix, program, tests = RIGHT[name]
    assert judge(program, tests, prefix) == (1.0, {"passed": 1, "total": 1})


@pytest.mark.parametrize(
    "name", [n if n in CHEATS_ALWAYS_RUN else pytest.param(n, marks=pytest.mark.slow) for n in CHEATS]
)
def test_cheats_earn_nothing(judge: Any, name: str):
    program, tests = CHEATS[name]
    reward, info = judge(program, tests)
    assert (reward, info["passed"]) == (0.0, 0), info


def test_what_cannot_be_judged_is_a_failure_and_no_reward(judge: Any):
    with pytest.raises(VerifierError, match="cannot be judged: a test derives a class from Base"):
        judge("class Base:\n    pass", "class Mine(Base):\n    pass")
    with pytest.raises(VerifierError, match="cannot be judged: test 1 imports no_such_library"):
        judge("def f(): pass", ["f()", "import no_such_library"])
    with pytest.raises(VerifierError, match="cannot be judged: a test derives"):
        judge(
            "class Base:\n    pass",
            "try:\n    class Mine(Base):\n        pass\nexcept BaseException:\n    pass",
        )


def test_an_import_that_the_program_gets_wrong_is_its_own_fault(judge: Any):
    reward, info = judge("def f():\n    import no_such_library", "f()")
    assert reward == 0.0
    assert "ModuleNotFoundError" in info["stderr"]


def test_tests_that_take_too_long_fail_and_a_program_that_does_earns_nothing():
    settings = {"timeout_seconds": 2.0, "total_timeout_seconds": 4.0}
    environment = make_environment(CodeConfig(kind="code", **settings), "e")

    def judged(program: str, **entry: Any) -> Any:
        return asyncio.run(grade(environment, Prompt(0, "p", [1], {"entry": entry}), program))

    with pytest.raises(VerifierError, match=r"the judge of the tests ended early \(timeout\)"):
        judged("def f(): pass", tests="f()\nwhile True:\n    pass")
    reward, info = judged("import time\ndef f(): time.sleep(60)", tests=["pass", "f()"])
    assert (reward, info["outcome"]) == (0.0, "timeout")
    # Five cases, each within its limit but not within that of all: the program's fault, not the judge's.
    cases = [{"input": f"{number}\n", "output": f"{number}\n"} for number in range(5)]
    reward, info = judged("import time\ntime.sleep(1.2)\nprint(input())", cases=cases)
    assert (reward, info["passed"], info["total"], info["outcome"]) == (0.0, 3, 5, "timeout")


def test_values_too_large_for_a_message_are_told(judge: Any):
    reward, info = judge(
        "def f(n):\n    return 'x' * n", ["assert f(9) == 'x' * 9", "f(17 << 20)", "assert f(2) == 'xx'"]
    )
    assert (reward, info["passed"]) == (0.0, 2)
    assert "test 1: ValueError: values of 17 MiB in one call, above 16" in info["stderr"]
