"""Multiple choice, regular expressions and a model as judge: right, wrong, odd and empty answers."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal

import pytest

from megarl.config.environments import JudgeConfig, MathEnvironmentConfig, MultipleChoiceConfig, RegexConfig
from megarl.environments import VerifierError, check_references, grade, make_environment
from megarl.environments.text import last_boxed
from megarl.errors import UserError
from megarl.records import Prompt

EXTRACTS: tuple[Literal["any", "boxed", "last_number"], ...] = ("any", "boxed", "last_number")


def judged(environment: Any, response: str, **metadata: Any) -> tuple[float, dict[str, Any]]:
    return asyncio.run(grade(environment, Prompt(3, "p", [1], metadata), response))


@pytest.mark.parametrize(
    ("response", "choice"),
    [
        ("B", "B"),
        ("(b)", "B"),
        ("b", "B"),
        ("B. because it is larger", "B"),
        ("The answer is (C).", "C"),
        ("Answer: **D**", "D"),
        ("A is wrong, so the answer is B", "B"),
        ("The answer is A. No: the answer is B.", "B"),
        ("<answer> c </answer>", "C"),
        ("so \\boxed{\\text{D}}", "D"),
        ("answer: option A", "A"),
        ("I think\n\nC", "C"),
        ("It could be (A) or (B)", None),
        ("A man walks into a bar", None),
        ("The answer is apples", None),
        ("", None),
        ("E", None),
        ("none of them", None),
    ],
)
def test_the_letter_a_response_chooses(response: str, choice: str | None):
    environment = make_environment(MultipleChoiceConfig(kind="multiple_choice"), "e")
    for position, letter in enumerate("ABCD"):
        for reference in (letter, letter.lower(), str(position), position):
            reward, info = judged(environment, response, answer=reference)
            assert info == {"choice": choice}
            assert reward == float(choice == letter)


def test_an_unusable_reference_is_refused_at_load_and_never_a_reward():
    config = MultipleChoiceConfig(kind="multiple_choice", choices="ABCDEF", choices_field="options")
    entry = {"options": ["x", "y", "z"]}
    check_references(config, "e", [("f:1", "C", entry), ("f:2", "0", entry)])
    for answer, words in (("D", "'D' is neither one of ABC"), ("3", "'3' is neither"), ("", "'' is neither")):
        with pytest.raises(UserError, match=f"f:7: {words}"):
            check_references(config, "e", [("f:7", answer, entry)])
    with pytest.raises(UserError, match="f:8: field 'options' is no list"):
        check_references(config, "e", [("f:8", "A", {"options": []})])
    with pytest.raises(VerifierError, match="neither one of ABC"):
        judged(make_environment(config, "e"), "A", answer="E", entry=entry)


@pytest.mark.parametrize(
    ("settings", "response", "reward"),
    [
        ({"pattern": r"yes|no"}, " yes\n", 1.0),
        ({"pattern": r"yes|no"}, "yes it is", 0.0),
        ({"pattern": r"yes|no"}, "", 0.0),
        ({"pattern": r"<a>(?P<answer>.*?)</a>", "full_match": False}, "<a>1</a> no <a> 42 </a>.", 1.0),
        ({"pattern": r"<a>(?P<answer>.*?)</a>", "full_match": False}, "<a>42</a> no <a>1</a>", 0.0),
        ({"pattern": r"<a>(?P<answer>.*?)</a>", "format_reward": 0.25}, "<a>41</a>", 0.25),
        ({"pattern": r"<a>(?P<answer>.*?)</a>", "format_reward": 0.25}, "a 41 a", 0.0),
        ({"pattern": r"is (?P<answer>.*)", "ignore_case": True}, "IS 42", 1.0),
        ({"pattern": r"no|(?P<answer>.*)"}, "no", 0.0),  # the group took no part in the match
    ],
)
def test_regex(settings: dict[str, Any], response: str, reward: float):
    environment = make_environment(RegexConfig(kind="regex", **settings), "e")
    assert judged(environment, response, answer="42")[0] == reward


@pytest.fixture(scope="module")
def extracting() -> Iterator[dict[str, Any]]:
    made = {e: make_environment(MathEnvironmentConfig(extract=e), "e") for e in EXTRACTS}
    yield made
    for environment in made.values():
        environment.close()  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("extract", "response", "reward"),
    [
        ("boxed", "x = 41, \\boxed{\\frac{84}{2}}", 1.0),
        ("boxed", "\\boxed{41} or rather \\boxed{42}", 1.0),
        ("boxed", "\\boxed{42} or \\boxed{41}", 0.0),
        ("boxed", "it is 42", 0.0),
        ("boxed", "\\boxed{42", 0.0),
        ("last_number", "\\boxed{41}, no: 42.", 1.0),
        ("last_number", "42 of 43", 0.0),
        ("last_number", "none", 0.0),
        ("any", "it is 42", 1.0),
    ],
)
def test_where_a_mathematical_answer_stands(extracting: Any, extract: str, response: str, reward: float):
    assert judged(extracting[extract], response, answer="42")[0] == reward


def test_the_last_complete_box():
    assert last_boxed(r"\boxed{1} \boxed{\frac{a}{b^{2}}} \boxed{open") == r"\frac{a}{b^{2}}"
    assert last_boxed(r"\boxed{\{1, 2\}}") == r"\{1, 2\}"
    assert last_boxed("none") == ""


class Endpoint:
    """A judge on 127.0.0.1 that returns the listed answers in turn, the last one forever."""

    def __init__(self, answers: list[Any]) -> None:
        self.answers, self.requests, self.headers = answers, list[dict[str, Any]](), list[Any]()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                outer.requests.append({"path": self.path, **json.loads(body)})
                outer.headers.append(self.headers)
                answer = outer.answers[min(len(outer.requests), len(outer.answers)) - 1]
                if isinstance(answer, float):
                    time.sleep(answer)
                    return
                status, content = answer
                reply = content
                if status == 200 and not content.startswith("{"):
                    reply = json.dumps({"choices": [{"message": {"role": "assistant", "content": content}}]})
                self.send_response(status)
                self.send_header("Content-Length", str(len(reply.encode())))
                self.end_headers()
                self.wfile.write(reply.encode())

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/v1"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture
def serve() -> Iterator[Any]:
    started: list[Endpoint] = []

    def start(*answers: Any) -> Endpoint:
        started.append(Endpoint(list(answers)))
        return started[-1]

    yield start
    for each in started:
        each.server.shutdown()
        each.server.server_close()


def judge(url: str, **settings: Any) -> Any:
    defaults: dict[str, Any] = {"retry_seconds": 0.01, "request_timeout_seconds": 0.3, "num_attempts": 3}
    config = JudgeConfig(kind="judge", base_url=url, model="big", **(defaults | settings))
    return make_environment(config, "data.train.environment")


def test_the_judge_sees_the_problem_and_its_last_score_counts(serve: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("JUDGE_KEY", "secret")
    endpoint = serve((200, "Score: 2 at first sight, but\nscore: 7.5"))
    environment = judge(endpoint.url, api_key_variable="JUDGE_KEY")
    reward, info = judged(environment, "It {answer} is.", question="Why?", answer="Because.")
    assert reward == 0.75
    assert info["attempts"] == 1
    [request] = endpoint.requests
    assert request["path"] == "/v1/chat/completions"
    assert request["model"] == "big"
    text = request["messages"][0]["content"]
    assert "Why?" in text
    assert "Because." in text
    assert "It {answer} is." in text  # the response's own braces are text
    assert endpoint.headers[0]["Authorization"] == "Bearer secret"


def test_what_passes_is_asked_again(serve: Any):
    endpoint = serve((500, "busy"), 0.6, (200, "Score: 10"))
    reward, info = judged(judge(endpoint.url), "r")
    assert (reward, info["attempts"]) == (1.0, 3)
    endpoint = serve((429, "slow down"), (200, "I would rather not say"), (200, "Score: 0"))
    assert judged(judge(endpoint.url), "r")[0] == 0.0  # a zero that the judge gave


@pytest.mark.parametrize(
    ("answer", "words", "requests"),
    [
        ((503, "down"), "after 3 requests; the last: status 503: down", 3),
        ((200, "good"), "after 3 requests; the last: no score in 'good'", 3),
        ((200, "Score: 11"), r"the score 11 is outside \[0, 10\]", 3),
        ((200, "Score: -1"), r"the score -1 is outside", 3),
        ((200, '{"error": "x"}'), "not a chat completion", 3),
        (0.6, "no answer within 0.3 s", 3),
        ((401, "who are you"), "status 401: who are you", 1),
    ],
)
def test_without_a_score_it_is_an_error_and_never_zero(serve: Any, answer: Any, words: str, requests: int):
    endpoint = serve(answer)
    with pytest.raises(VerifierError, match=f"JudgeError: .*{words}"):
        judged(judge(endpoint.url), "r")
    assert len(endpoint.requests) == requests


def test_nobody_listens_and_no_key():
    with pytest.raises(VerifierError, match="JudgeError: .*ConnectError"):
        judged(judge("http://127.0.0.1:9/v1"), "r")
    with pytest.raises(UserError, match="data.train.environment.api_key_variable: NO_SUCH_KEY is not set"):
        judge("http://127.0.0.1:9/v1", api_key_variable="NO_SUCH_KEY")


def test_many_are_judged_at_a_time(serve: Any):
    endpoint = serve((200, "Score: 5"))
    environment = judge(endpoint.url, request_timeout_seconds=5.0)

    async def play() -> list[Any]:
        return await asyncio.gather(
            *(grade(environment, Prompt(i, "p", [1], {"question": f"q{i}."}), f"r{i}.") for i in range(20))
        )

    assert [reward for reward, _ in asyncio.run(play())] == [0.5] * 20
    seen = {request["messages"][0]["content"] for request in endpoint.requests}
    assert all(any(f"q{i}." in text and f"r{i}." in text for text in seen) for i in range(20))


def test_the_form_and_the_scale_of_a_judges_score(serve: Any):
    endpoint = serve((200, "Score: 2\nGrade = 3"))
    grade_of = {"score_pattern": r"Grade = (\d)", "max_score": 4.0}
    assert judged(judge(endpoint.url, **grade_of), "x", question="q", answer="a")[0] == 0.75
    assert judged(judge(endpoint.url, max_score=4.0), "x", question="q", answer="a")[0] == 0.5
    assert judged(judge(endpoint.url), "x", question="q", answer="a")[0] == 0.2


def test_the_letters_there_are_to_choose_from():
    def choice(config: MultipleChoiceConfig, response: str, **entry: Any) -> Any:
        return judged(make_environment(config, "e"), response, answer="A", entry=entry)[1]["choice"]

    four, six = (MultipleChoiceConfig(kind="multiple_choice", choices=c) for c in ("ABCD", "ABCDEF"))
    assert choice(four, "The answer is (E).") is None
    assert choice(six, "The answer is (E).") == "E"
    options = {"options": ["red", "green"]}
    by_row = MultipleChoiceConfig(kind="multiple_choice", choices_field="options")
    assert choice(four, "The answer is (C).", **options) == "C"
    assert choice(by_row, "The answer is (C).", **options) is None, "this row has two"
    assert choice(by_row, "The answer is (B).", **options) == "B"


def test_a_judge_is_asked_as_the_settings_say(serve: Any):
    endpoint = serve((200, "Score: 5"))
    own = {"prompt": "Is {response} good?", "temperature": 0.7, "max_tokens": 9}
    for settings in ({}, own):
        judged(judge(endpoint.url, **settings), "x", question="q", answer="a")
    default, changed = endpoint.requests
    assert (default["temperature"], default["max_tokens"]) == (0.0, 512)
    assert default["messages"][0]["content"].startswith("Grade a response")
    assert (changed["temperature"], changed["max_tokens"]) == (0.7, 9)
    assert changed["messages"] == [{"role": "user", "content": "Is x good?"}]


def test_the_pause_before_a_judge_is_asked_again_doubles(serve: Any, monkeypatch: pytest.MonkeyPatch):
    pauses: list[float] = []

    async def sleep(seconds: float) -> None:
        pauses.append(seconds)

    endpoint = serve((500, "busy"), (500, "busy"), (500, "busy"), (200, "Score: 5"))
    environment = judge(endpoint.url, num_attempts=4, retry_seconds=3.0, request_timeout_seconds=5.0)
    with monkeypatch.context() as patch:
        patch.setattr("megarl.environments.judge.asyncio.sleep", sleep)
        assert judged(environment, "r")[0] == 0.5
    assert [pause for pause in pauses if pause >= 1] == [3.0, 6.0, 12.0]
