"""Mathematical answers: known equalities, hostile responses, and references rejected at load."""

from __future__ import annotations

import asyncio
import os
import pickle
import signal
import threading
import time

import pytest

from megarl.config.data import JsonlSource
from megarl.environments import VerifierError, grade, make
from megarl.environments import math as math_environment
from megarl.environments.math import MathEnvironment, check_references
from megarl.errors import UserError
from megarl.records import Prompt


@pytest.fixture(scope="module")
def environment():
    environment = make(JsonlSource(source="jsonl", path="unused"))
    yield environment
    environment.close()


def judge(environment, reference, response):
    return asyncio.run(grade(environment, Prompt(5, "", [1], {"answer": reference}), response))


@pytest.mark.parametrize(
    ("reference", "response", "equal"),
    [
        ("42", "The answer is 42.", True),
        ("42", "6 * 7 = \\boxed{42}", True),
        ("42", "first 42, but then 43", False),
        ("-7", "so it is -7", True),
        ("1,234", "1234", True),
        ("\\frac{1}{2}", "0.5", True),
        ("$\\frac{1}{2}$", "\\boxed{\\frac{2}{4}}", True),
        ("\\boxed{3}", "$3$", True),
        ("1/3", "\\(\\frac{1}{3}\\)", True),
        ("1/3", "0.3", False),
        ("2^{10}", "1024", True),  # in plain text math-verify would read the reference as 2
        ("2^{10}", "2", False),
        ("\\sqrt{8}", "$2\\sqrt{2}$", True),
        ("x^2 + 2x + 1", "$(x+1)^2$", True),
        ("x^2 + 2x + 1", "$(x+2)^2$", False),
        ("\\{1, 2\\}", "$\\{2, 1\\}$", True),
        ("50\\%", "0.5", True),
        ("\\text{yes}", "\\boxed{\\text{yes}}", True),
    ],
)
def test_equivalence(environment, reference, response, equal):
    reward, info = judge(environment, reference, response)
    assert reward == float(equal)
    assert set(info) == {"answer"}


@pytest.mark.parametrize("response", ["", "I do not know.", "\\boxed{", "$\\frac{1$"])
def test_an_unparsed_response_is_no_error_but_is_marked(environment, response):
    reward, info = judge(environment, "42", response)
    assert reward == 0.0
    assert info["unparsed"] is True


def test_a_response_that_never_ends_is_cut_off_and_the_next_is_judged(environment):
    start = time.monotonic()
    reward, info = judge(environment, "7", "\\boxed{9^{9^{9^{9}}}}")
    assert reward == 0.0
    assert info.keys() & {"timeout", "unparsed", "incomparable"}
    assert time.monotonic() - start < 60
    assert judge(environment, "7", "7")[0] == 1.0


def test_any_thread_can_ask(environment):
    results = []
    threads = [
        threading.Thread(target=lambda i=i: results.append((i, judge(environment, str(i), "It is 2.")[0])))
        for i in range(5)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(results) == [(i, float(i == 2)) for i in range(5)]


def test_an_unusable_reference_is_an_error_not_a_reward(environment):
    with pytest.raises(VerifierError, match="prompt 5: .*'Paris'"):
        judge(environment, "Paris", "Paris")


def test_a_dead_worker_is_an_error_and_is_replaced():
    environment = MathEnvironment()
    assert judge(environment, "1", "1")[0] == 1.0
    process = environment._worker._process
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    with pytest.raises(VerifierError, match=r"prompt 5: .*math-verify process ended \(exit status -9\)"):
        judge(environment, "1", "1")
    assert judge(environment, "1", "1")[0] == 1.0
    environment.close()


def test_a_worker_that_stands_still_is_a_failure_and_no_reward(monkeypatch):
    environment = MathEnvironment()
    assert judge(environment, "1", "1")[0] == 1.0
    process = environment._worker._process
    os.kill(process.pid, signal.SIGSTOP)
    monkeypatch.setattr(math_environment, "_DEADLINE_SECONDS", 0.5)
    with pytest.raises(VerifierError, match=r"held up: 0\.\d s of computing in 0\.5 s"):
        judge(environment, "1", "1")
    assert process.poll() == -signal.SIGKILL
    monkeypatch.undo()
    assert judge(environment, "1", "1")[0] == 1.0
    environment.close()


WORKER = """
import json, sys
for line in sys.stdin:
    if "spin" in line:
        while True:
            pass
    cpu = 4.0 if "hard" in line else 0.1
    print(json.dumps({"outcome": "timeout", "detail": "parsing", "cpu_seconds": cpu}), flush=True)
"""


def test_what_computes_for_too_long_earns_nothing_and_what_was_held_up_fails(monkeypatch, tmp_path):
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    monkeypatch.setattr(math_environment, "_WORKER", script)
    monkeypatch.setattr(math_environment, "_COMPUTING", 0.01)  # this machine may be busy
    environment = MathEnvironment()
    assert judge(environment, "1", "hard")[1]["timeout"] is True
    monkeypatch.setattr(math_environment, "_DEADLINE_SECONDS", 2.0)
    assert judge(environment, "1", "spin") == (0.0, {"timeout": True, "detail": "killed after 2 s"})
    monkeypatch.undo()
    monkeypatch.setattr(math_environment, "_WORKER", script)
    assert judge(environment, "1", "hard")[0] == 0.0
    with pytest.raises(VerifierError, match="held up: 0.1 s of computing in 5 s"):
        judge(environment, "1", "easy")  # the worker's alarm went off, but it had hardly computed
    environment.close()


def test_a_copy_in_another_process_starts_its_own_worker(environment):
    judge(environment, "1", "1")
    copy = pickle.loads(pickle.dumps(environment))
    assert judge(copy, "4", "4")[0] == 1.0
    assert copy._worker._process.pid != environment._worker._process.pid
    copy.close()


@pytest.mark.parametrize("reference", ["", "  ", "Paris", "hello world", "$\\frac{1$", "?"])
def test_references_that_cannot_be_parsed_name_their_line(reference):
    with pytest.raises(UserError) as caught:
        check_references([("p.jsonl:1: field 'a'", "1"), ("p.jsonl:2: field 'a'", reference)])
    assert str(caught.value).startswith("p.jsonl:2: field 'a'")
    assert repr(reference) in str(caught.value)
