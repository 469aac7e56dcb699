"""Routing of requests to several engines; each expected share is written by hand."""

from __future__ import annotations

import pytest

from megarl.inference.interface import GenerateRequest
from megarl.inference.router import RequestRouter
from megarl.records import token_ids


def request(name: str, prompt: int, episode: int | None = None) -> GenerateRequest:
    """Without an episode, only the prompt's tokens identify related requests."""
    return GenerateRequest(name, token_ids([prompt, 7]), 5, 1, None if episode is None else (prompt, episode))


def names(shares: list[list[GenerateRequest]]) -> list[list[str]]:
    return [[r.request_id for r in share] for share in shares]


@pytest.mark.parametrize("told", [True, False], ids=["lineage", "tokens"])
def test_groups_stay_whole_where_there_are_as_many_as_engines(told: bool) -> None:
    """Four prompts of three samples, in turns as a step of three rounds might have them."""
    requests = [request(f"{p}{s}", p, 4 * s + p if told else None) for s in range(3) for p in range(4)]
    router = RequestRouter(2)
    assert names(router.route(requests)) == [
        ["00", "20", "01", "21", "02", "22"],
        ["10", "30", "11", "31", "12", "32"],
    ]
    assert router.loads == [6, 6]


def test_what_is_left_over_is_dealt_by_samples() -> None:
    """Of three prompts two go to an engine each, the third to both."""
    router = RequestRouter(2)
    requests = [request(f"{p}{s}", p, 10 * p + s) for p in range(3) for s in range(4)]
    assert names(router.route(requests)) == [
        ["00", "01", "02", "03", "20", "22"],
        ["10", "11", "12", "13", "21", "23"],
    ]


def test_fewer_prompts_than_engines_leave_none_idle() -> None:
    router = RequestRouter(3)
    assert names(router.route([request(f"{s}", 0) for s in range(6)])) == [["0", "3"], ["1", "4"], ["2", "5"]]


def test_an_episode_goes_on_where_it_is() -> None:
    router = RequestRouter(2)
    router.route([request("a0", 0, 0), request("b0", 1, 1)])
    for name in ("a0", "b0"):
        router.finish(name)
    assert names(router.route([request("b1", 1, 1)])) == [[], ["b1"]], "the other has as little to do"
    assert names(router.route([request("b2", 1, 1)])) == [[], ["b2"]], "the other has less to do"


def test_late_requests_go_to_the_engine_with_the_least_to_do() -> None:
    router = RequestRouter(2)
    router.route([request("a", 0), request("b", 1)])
    router.finish("b")
    assert names(router.route([request("c", 2)])) == [[], ["c"]]
    router.finish("a")
    assert names(router.route([request("d", 3)])) == [["d"], []]


def test_an_id_in_use_is_refused_and_nothing_dealt() -> None:
    router = RequestRouter(2)
    router.route([request("a", 0)])
    with pytest.raises(ValueError, match="request a: the id occurs twice"):
        router.route([request("b", 1), request("a", 0)])
    assert router.loads == [1, 0]
    router.finish("a")
    assert sum(map(len, router.route([request("a", 0)]))) == 1
