"""Games: episodes played by hand, and by players that must win."""

from __future__ import annotations

import asyncio
import copy
from typing import Any

import pytest

from megarl.config.environments import NumberGuessingConfig, SlidingPuzzleConfig
from megarl.environments import make_environment
from megarl.environments.sliding_puzzle import draw, slide, solved
from megarl.records import Prompt


def play(game: Any, seed: int, player: Any) -> tuple[list[str], list[float], dict[str, Any]]:
    """Return the dialogue, the rewards and the last info; ``player(text)`` returns actions."""

    async def episode() -> Any:
        made = game.problem(seed)
        one = copy.copy(game)
        prompt = Prompt(0, made.text, [1], {"answer": made.answer, **made.metadata})
        said, rewards = [(await one.reset(prompt)).text], []
        while True:
            result = await one.step(player(said[-1]))
            rewards.append(result.reward)
            if result.done:
                return said, rewards, result.info
            said.append(result.observation.text)

    found: tuple[list[str], list[float], dict[str, Any]] = asyncio.run(episode())
    return found


class Halves:
    """Finds a number in [low, high] in at most log2 steps."""

    def __init__(self, low: int, high: int) -> None:
        self.low, self.high, self.guess = low, high, 0

    def __call__(self, text: str) -> str:
        if text == "higher":
            self.low = self.guess + 1
        elif text == "lower":
            self.high = self.guess - 1
        self.guess = (self.low + self.high) // 2
        return f"Then it is {self.guess}."


def test_halving_finds_every_number():
    game = make_environment(
        NumberGuessingConfig(kind="number_guessing", low=-3, high=60, turn_penalty=0.1), "e"
    )
    numbers = set()
    for seed in range(300):
        said, rewards, info = play(game, seed, Halves(-3, 60))
        assert info["found"]
        assert rewards[:-1] == [0.0] * (len(rewards) - 1)
        assert rewards[-1] == pytest.approx(1 - 0.1 * (len(rewards) - 1))
        assert len(rewards) <= 7  # 64 numbers
        assert "-3 to 60" in said[0]
        numbers.add(info["answer"])
    assert len(numbers) > 60


def test_a_lost_game_and_guesses_that_are_none():
    config = NumberGuessingConfig(kind="number_guessing", low=1, high=9, max_guesses=3)
    said, rewards, info = play(
        make_environment(config, "e"), 1, lambda text: "no idea" if "from" in text else "10"
    )
    assert said[1:] == ["a number from 1 to 9"] * 2
    assert rewards == [0.0] * 3
    assert info["found"] is False


def search(tiles: list[int], size: int) -> list[str]:
    """The shortest solution, by breadth-first search."""
    frontier: list[tuple[list[int], list[str]]] = [(tiles, [])]
    seen = {tuple(tiles)}
    while frontier:
        following = []
        for now, moves in frontier:
            if now == solved(size):
                return moves
            for word in ("up", "down", "left", "right"):
                moved = slide(now, size, word)
                if moved and tuple(moved) not in seen:
                    seen.add(tuple(moved))
                    following.append((moved, [*moves, word]))
        frontier = following
    raise AssertionError("no solution")


def test_every_puzzle_can_be_solved_and_a_solver_solves_it():
    game: Any = make_environment(SlidingPuzzleConfig(kind="sliding_puzzle", num_shuffles=6), "e")
    boards = set()
    for seed in range(30):
        tiles = game.problem(seed).metadata["tiles"]
        boards.add(tuple(tiles))
        moves = iter(search(tiles, 3))
        assert tiles != solved(3)
        _, rewards, info = play(game, seed, lambda text, moves=moves: f"not left or right but {next(moves)}!")
        assert info["solved"]
        assert rewards[-1] == 1.0
        assert len(rewards) <= 6
    assert len(boards) > 15


def test_tiles_slide_the_way_they_are_told():
    tiles = [1, 2, 3, 4, 0, 5, 7, 8, 6]
    assert draw(tiles, 3) == "1 2 3\n4 . 5\n7 8 6"
    assert draw(slide(tiles, 3, "left") or [], 3) == "1 2 3\n4 5 .\n7 8 6"
    assert draw(slide(tiles, 3, "up") or [], 3) == "1 2 3\n4 8 5\n7 . 6"
    assert slide(solved(3), 3, "up") is None
    config = SlidingPuzzleConfig(kind="sliding_puzzle", size=2, max_moves=2, illegal_penalty=0.25)
    said, rewards, info = play(make_environment(config, "e"), 3, lambda text: "hm")
    assert rewards == [-0.25] * 2
    assert said[1].startswith("No tile can slide that way.\n")
    assert not info["solved"]
