"""Programs judged by tests: right, wrong, cut off, cheating, and by standard input and output."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from megarl.config.environments import CodeConfig
from megarl.environments import VerifierError, check_references, grade, make_environment, sandbox
from megarl.environments.sandbox_streams import Finished
from megarl.errors import UserError
from megarl.records import Prompt

TESTS = ["assert add(1, 2) == 3", "assert add(-1, 1) == 0", "assert add('a', 'b') == 'ab'"]
CASES = [{"input": "1 2\n", "output": "3\n"}, {"input": "10 -4\n", "output": "6"}]
RIGHT = "Here it is:\n```python\ndef add(a, b):\n    return a + b\n```\nDone."


@pytest.fixture(scope="module")
def code() -> Any:
    try:
        sandbox.choose()
    except UserError as error:
        pytest.skip(str(error))

    def judge(
        response: str, *, prefix: str = "", settings: dict[str, Any] | None = None, **entry: Any
    ) -> Any:
        config = CodeConfig(kind="code", **({"timeout_seconds": 5.0} | (settings or {})))
        metadata = {"entry": entry, "prefix": prefix}
        return asyncio.run(grade(make_environment(config, "e"), Prompt(0, "p", [1], metadata), response))

    return judge


def test_right_wrong_and_partly_right(code: Any):
    assert code(RIGHT, tests=TESTS) == (1.0, {"passed": 3, "total": 3})
    assert code("def add(a, b): return a + b", tests="\n".join(TESTS))[0] == 1.0
    assert code("```\ndef add(a, b):\n    return a + b", tests=TESTS)[0] == 1.0  # cut off
    reward, info = code("```python\ndef add(a, b): return abs(a) + b\n```", tests=TESTS)
    assert (reward, info["passed"]) == (0.0, 1)
    assert "test 1: AssertionError" in info["stderr"]
    partial = {"partial_credit": True}
    assert code("def add(a, b): return int(a) + b", tests=TESTS, settings=partial)[0] == pytest.approx(2 / 3)


def test_what_the_task_gave_comes_first(code: Any):
    head = "from math import floor\n\n\ndef half(x: float) -> int:\n    '''Half of x.'''\n"
    assert code("    return floor(x / 2)\n", prefix=head, tests="assert half(5) == 2")[0] == 1.0
    whole = "```python\ndef half(x):\n    return floor(x / 2)\n```"
    assert code(whole, prefix=head, tests="assert half(5) == 2")[0] == 1.0


@pytest.mark.parametrize(
    "response",
    [
        "import os\nos._exit(0)",
        "import sys\nsys.exit(0)",
        "def add(a, b): raise SystemExit(0)",
        "import os\nfor i in range(3):\n    os.write(4, b'%d\\n' % i)\nos._exit(0)",
        "while True: pass",
        "print('all tests passed')",
        "def add(a, b",
        "",
        "x" * 100_000,
    ],
)
def test_nothing_passes_that_did_not_run(code: Any, response: str):
    reward, info = code(response, tests=TESTS, settings={"timeout_seconds": 2.0})
    assert (reward, info["passed"], info["total"]) == (0.0, 0, 3)
    assert info["outcome"] in ("exited", "timeout")


def test_standard_input_and_output(code: Any):
    program = "a, b = map(int, input().split())\nprint(a + b, ' ')"
    assert code(program, cases=CASES) == (1.0, {"passed": 2, "total": 2})
    assert code("print(3)", cases=CASES)[0] == 0.0
    assert code("print(3)", cases=CASES, settings={"partial_credit": True})[0] == 0.5
    assert code("print(3)\n1 / 0", cases=CASES[:1])[0] == 0.0


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({}, "needs one of the fields 'tests' and 'cases'"),
        ({"tests": "assert 1", "cases": CASES}, "needs one of"),
        ({"tests": []}, "tests must be Python text"),
        ({"tests": "assert ("}, "never closed"),
        ({"tests": "-" * 20_000 + "1"}, "(MemoryError|recursion|too many)"),
        (
            {"tests": ["assert f(1)", "import numpy as np\nassert f(np)"]},
            "the tests import numpy, which the sandbox",
        ),
        ({"cases": [{"input": "1"}]}, "cases must be a list of"),
    ],
)
def test_unusable_tests_are_refused_at_load_and_never_a_reward(code: Any, entry: dict[str, Any], words: str):
    with pytest.raises(UserError, match=f"f:3: .*{words}"):
        check_references(CodeConfig(kind="code"), "e", [("f:3", "", entry)])
    if words.startswith("tests must be"):
        with pytest.raises(VerifierError, match="tests must be"):
            code(RIGHT, **entry)


def test_tests_and_cases_can_stand_in_fields_of_other_names(code: Any):
    fields = {"tests_field": "checks", "cases_field": "runs"}
    wrong = ["assert False"]
    assert code(RIGHT, checks=TESTS, tests=wrong, settings=fields) == (1.0, {"passed": 3, "total": 3})
    assert code(RIGHT, checks=wrong, tests=TESTS, settings=fields)[0] == 0.0
    adds = "print(sum(map(int, input().split())))"
    assert code(adds, runs=CASES, cases=[{"input": "1 1", "output": "3"}], settings=fields)[0] == 1.0


@pytest.mark.parametrize(
    ("name", "small", "large", "program", "outcome"),
    [
        ("memory_mib", 64, 512, "x = bytearray(200 << 20)\nx[::4096] = b'x' * len(x[::4096])", "exited"),
        ("disk_mib", 4, 16, "open('file', 'wb').write(b'x' * (8 << 20))", "exited"),
        ("output_kib", 16, 256, "import sys\nsys.stderr.write('x' * (100 << 10))", "output"),
        (
            "num_processes",
            4,
            16,
            "import threading\nstop = threading.Event()\n"
            "for _ in range(8): threading.Thread(target=stop.wait, daemon=True).start()\nstop.set()",
            "exited",
        ),
    ],
)
def test_a_program_has_what_its_limits_leave(
    code: Any, name: str, small: int, large: int, program: str, outcome: str
):
    """The same program, beyond one limit and within the other."""
    cases = [{"input": "", "output": "done\n"}]
    reward, info = code(f"{program}\nprint('done')", cases=cases, settings={name: small})
    assert (reward, info["outcome"]) == (0.0, outcome), info
    assert code(f"{program}\nprint('done')", cases=cases, settings={name: large})[0] == 1.0


@pytest.mark.parametrize("wanted", ["bubblewrap", "landlock"])
def test_programs_run_in_the_isolation_that_is_asked_for(wanted: Any, monkeypatch: pytest.MonkeyPatch):
    ran: list[str] = []

    def run(program: Any, limits: Any, isolation: str, stop: Any = None) -> Finished:
        ran.append(isolation)
        return Finished("exited", 0, b"3\n", b"")

    monkeypatch.setattr(sandbox, "_problem", lambda isolation: None)
    monkeypatch.setattr(sandbox, "not_held", lambda isolation: ())
    monkeypatch.setattr(sandbox, "choose", sandbox.choose.__wrapped__)
    monkeypatch.setattr(sandbox, "run", run)
    for isolation, used in (("auto", "namespaces"), (wanted, wanted)):
        environment = make_environment(CodeConfig(kind="code", isolation=isolation), "e")
        prompt = Prompt(0, "p", [1], {"entry": {"cases": CASES[:1]}})
        assert asyncio.run(grade(environment, prompt, "print(3)"))[0] == 1.0
        assert ran.pop() == used
