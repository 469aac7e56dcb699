"""Who of several engines samples what; each expected share by hand."""

from __future__ import annotations

import pytest

from megarl.records import token_ids
from megarl.rollout.dealing import Dealer
from megarl.rollout.engine import GenerateRequest


def request(name: str, prompt: int, episode: int | None = None) -> GenerateRequest:
    """Without an episode nothing but the prompt's tokens tells what belongs together."""
    return GenerateRequest(name, token_ids([prompt, 7]), 5, 1, None if episode is None else (prompt, episode))


def names(shares: list[list[GenerateRequest]]) -> list[list[str]]:
    return [[r.request_id for r in share] for share in shares]


@pytest.mark.parametrize("told", [True, False], ids=["lineage", "tokens"])
def test_groups_stay_whole_where_there_are_as_many_as_engines(told: bool) -> None:
    """Four prompts of three samples, in turns as a step of three rounds might have them."""
    requests = [request(f"{p}{s}", p, 4 * s + p if told else None) for s in range(3) for p in range(4)]
    dealer = Dealer(2)
    assert names(dealer.deal(requests)) == [
        ["00", "20", "01", "21", "02", "22"],
        ["10", "30", "11", "31", "12", "32"],
    ]
    assert dealer.loads == [6, 6]


def test_what_is_left_over_is_dealt_by_samples() -> None:
    """Of three prompts two go to an engine each, the third to both."""
    dealer = Dealer(2)
    requests = [request(f"{p}{s}", p, 10 * p + s) for p in range(3) for s in range(4)]
    assert names(dealer.deal(requests)) == [
        ["00", "01", "02", "03", "20", "22"],
        ["10", "11", "12", "13", "21", "23"],
    ]


def test_fewer_prompts_than_engines_leave_none_idle() -> None:
    dealer = Dealer(3)
    assert names(dealer.deal([request(f"{s}", 0) for s in range(6)])) == [["0", "3"], ["1", "4"], ["2", "5"]]


def test_an_episode_goes_on_where_it_is() -> None:
    dealer = Dealer(2)
    dealer.deal([request("a0", 0, 0), request("b0", 1, 1)])
    for name in ("a0", "b0"):
        dealer.finish(name)
    assert names(dealer.deal([request("b1", 1, 1)])) == [[], ["b1"]], "the other has as little to do"
    assert names(dealer.deal([request("b2", 1, 1)])) == [[], ["b2"]], "the other has less to do"


def test_late_requests_go_to_the_engine_with_the_least_to_do() -> None:
    dealer = Dealer(2)
    dealer.deal([request("a", 0), request("b", 1)])
    dealer.finish("b")
    assert names(dealer.deal([request("c", 2)])) == [[], ["c"]]
    dealer.finish("a")
    assert names(dealer.deal([request("d", 3)])) == [["d"], []]


def test_an_id_in_use_is_refused_and_nothing_dealt() -> None:
    dealer = Dealer(2)
    dealer.deal([request("a", 0)])
    with pytest.raises(ValueError, match="request a: the id occurs twice"):
        dealer.deal([request("b", 1), request("a", 0)])
    assert dealer.loads == [1, 0]
    dealer.finish("a")
    assert sum(map(len, dealer.deal([request("a", 0)]))) == 1
