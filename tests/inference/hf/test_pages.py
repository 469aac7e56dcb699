"""The page table against a memory that it moves pages in: every request finds what it wrote."""

from __future__ import annotations

import random

import numpy as np
import pytest

from megarl.inference.hf.pages import PAGE, PageTable, digests


class Memory:
    """Pages that remember the tokens written into them."""

    def __init__(self, num_pages: int) -> None:
        self.content: list[tuple[int, ...] | None] = [None] * num_pages
        self.moved = 0
        self.table = PageTable(num_pages, self.move)

    def move(self, sources: list[int], targets: list[int]) -> None:
        assert not set(sources) & set(targets) and len(set(targets)) == len(targets)
        for source, target in zip(sources, targets, strict=True):
            self.content[target] = self.content[source]
        self.moved += len(sources)


def pieces(tokens: np.ndarray) -> list[tuple[int, ...]]:
    return [tuple(tokens[start : start + PAGE].tolist()) for start in range(0, len(tokens), PAGE)]


@pytest.mark.parametrize("seed", range(8))
def test_requests_that_come_and_go_keep_their_pages(seed: int) -> None:
    rng = random.Random(seed)
    memory, held = Memory(24), dict[int, np.ndarray]()
    table, hits = memory.table, 0
    families = [np.array([rng.randrange(9) for _ in range(6 * PAGE)], np.int32) for _ in range(3)]
    for slot in range(300):
        family = rng.choice(families)
        tokens = family[: rng.randrange(1, len(family))].copy()
        if rng.random() < 0.3:
            tokens[-1] = 99
        count = -(-len(tokens) // PAGE)
        while count > table.room:  # several leave at once
            gone = rng.sample(sorted(held), rng.randrange(1, len(held) + 1))
            table.release(gone, keep=rng.random() < 0.8)
            for other in gone:
                del held[other]
        table.extend(slot, count)
        found = table.find(digests(tokens[:-1]))
        hits += len(found)
        for page, piece in zip(found, pieces(tokens), strict=False):
            assert memory.content[page] == piece, "a page that was found has the tokens of its digest"
        for page, piece in zip(table.pages[slot], pieces(tokens), strict=True):
            memory.content[page] = piece
        table.know(slot, digests(tokens))
        held[slot] = tokens
        for other, theirs in held.items():
            assert [memory.content[page] for page in table.pages[other]] == pieces(theirs)
            for number, page in enumerate(table.pages[other]):
                assert table.owner[page] == other and table.start[page] == number * PAGE
        used = sorted(page for other in held for page in table.pages[other])
        assert used == list(range(table.used)), "pages in use are the first ones"
        assert table.used + table.num_kept <= table.num_pages
    assert hits > 100


def test_a_digest_is_of_all_tokens_before_it() -> None:
    one = np.arange(3 * PAGE + 5, dtype=np.int32)
    other = one.copy()
    other[0] = 77
    assert len(digests(one)) == 3
    assert not set(digests(one)) & set(digests(other))
    assert digests(one, digests(one[: PAGE + 3])) == digests(one)


def test_what_was_kept_longest_unused_makes_room() -> None:
    memory = Memory(6)
    table = memory.table
    prompts = [np.full(PAGE, number, np.int32) for number in range(4)]
    for slot, prompt in enumerate(prompts[:3]):
        table.extend(slot, 1)
        table.know(slot, digests(prompt))
        table.release([slot], keep=True)
    assert table.num_kept == 3 and table.room == 6
    assert table.find(digests(prompts[0]))  # used again: number 1 is now the oldest
    table.extend(9, 4)
    assert [bool(table.find(digests(prompt))) for prompt in prompts[:3]] == [True, False, True]
    table.clear()
    assert table.used == table.num_kept == 0 and not table.find(digests(prompts[0]))
