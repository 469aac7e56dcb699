"""The sliding puzzle: order the tiles of a square with one gap."""

from __future__ import annotations

import random
import re
from typing import TYPE_CHECKING, Any

from megarl.environments.base import Problem
from megarl.environments.games import Game

if TYPE_CHECKING:
    from megarl.config.environments import SlidingPuzzleConfig

# Displacement of the gap when a tile slides in this direction.
_MOVES = {"up": (1, 0), "down": (-1, 0), "left": (0, 1), "right": (0, -1)}
_WORD = re.compile(r"\b(up|down|left|right)\b", re.IGNORECASE)
_RULES = (
    "Slide tiles into the gap (.) until they stand in order with the gap last. Each turn reply with one word:"
    " the way a tile slides (up, down, left, right)."
)


class SlidingPuzzleEnvironment(Game):
    """A ``size`` x ``size`` puzzle, ``num_shuffles`` random moves from solved; the last named move is made.

    Solving it gives reward 1; an illegal or missing move changes nothing and gives ``-illegal_penalty``. The
    episode ends when it is solved or after ``max_moves`` actions.
    """

    def __init__(self, config: SlidingPuzzleConfig) -> None:
        self._config = config
        self._tiles: list[int] = []
        self._moves = 0

    def problem(self, seed: int) -> Problem:
        """Scramble by moves that do not undo the previous one, until it is not solved."""
        size, rng = self._config.size, random.Random(seed)
        tiles, back, count = solved(size), "", 0
        while count < self._config.num_shuffles or tiles == solved(size):
            move = rng.choice([word for word in _MOVES if word != back and slide(tiles, size, word)])
            tiles = slide(tiles, size, move) or tiles
            back = {"up": "down", "down": "up", "left": "right", "right": "left"}[move]
            count += 1
        return Problem(f"{_RULES}\n\n{draw(tiles, size)}", "", {"tiles": tiles})

    def begin(self, metadata: dict[str, Any]) -> None:
        """Start an episode on a problem."""
        self._tiles, self._moves = list(metadata["tiles"]), 0

    def turn(self, action: str) -> tuple[str | None, float, dict[str, Any]]:
        """Make one move."""
        size = self._config.size
        self._moves += 1
        words = _WORD.findall(action)
        moved = slide(self._tiles, size, words[-1].lower()) if words else None
        reward = 0.0 if moved else -self._config.illegal_penalty
        self._tiles = moved or self._tiles
        done = self._tiles == solved(size)
        info = {"moves": self._moves, "solved": done}
        if done:
            return None, 1.0, info
        if self._moves == self._config.max_moves:
            return None, reward, info
        board = draw(self._tiles, size)
        return board if moved else f"No tile can slide that way.\n{board}", reward, info


def solved(size: int) -> list[int]:
    """Return the solved tiles: 1, 2, ... row by row, the gap (0) last."""
    return [*range(1, size * size), 0]


def slide(tiles: list[int], size: int, word: str) -> list[int] | None:
    """Return the tiles after a slide in direction ``word``; None if it is illegal."""
    row, column = divmod(tiles.index(0), size)
    other_row, other_column = row + _MOVES[word][0], column + _MOVES[word][1]
    if not (0 <= other_row < size and 0 <= other_column < size):
        return None
    moved, here, there = list(tiles), row * size + column, other_row * size + other_column
    moved[here], moved[there] = moved[there], moved[here]
    return moved


def draw(tiles: list[int], size: int) -> str:
    """Draw the board, one line per row; the gap is a dot."""
    rows = [tiles[i : i + size] for i in range(0, size * size, size)]
    return "\n".join(" ".join(str(tile) if tile else "." for tile in row) for row in rows)
