"""Verifiers: reasoning-gym's scores, concurrent episodes, and errors that stay errors."""

from __future__ import annotations

import asyncio

import pytest
import reasoning_gym

from megarl.config.data import ReasoningGymSource
from megarl.environments import StepResult, Verifier, VerifierError, grade, make
from megarl.errors import UserError
from megarl.records import Prompt


def prompt_of(entry, index=0) -> Prompt:
    return Prompt(index, entry["question"], [1], {"answer": entry["answer"], "entry": entry})


@pytest.mark.parametrize("task", ["chain_sum", "letter_counting", "fraction_simplification"])
def test_scores_are_the_task_s_own(task):
    environment = make(ReasoningGymSource(source="reasoning_gym", task=task, seed=3, size=10))
    dataset = reasoning_gym.create_dataset(task, seed=3, size=10)
    for entry in dataset:
        answer = entry["answer"]
        for text in (answer, f" {answer}\n", f"It is {answer}, I think", "nothing", ""):
            expected = dataset.score_answer(text.strip(), entry=entry)
            reward, info = asyncio.run(grade(environment, prompt_of(entry), text))
            assert reward == expected
            assert info == {"answer": text.strip(), "answer_tags": False}
        assert asyncio.run(grade(environment, prompt_of(entry), answer))[0] == 1.0


def test_the_last_answer_tag_counts():
    environment = make(ReasoningGymSource(source="reasoning_gym", task="chain_sum"))
    entry = reasoning_gym.create_dataset("chain_sum", seed=1, size=1)[0]
    text = f"<answer>0</answer> no, <answer> {entry['answer']} </answer> done"
    reward, info = asyncio.run(grade(environment, prompt_of(entry), text))
    assert reward == 1.0
    assert info == {"answer": entry["answer"], "answer_tags": True}


def test_an_unknown_task_is_a_user_error():
    with pytest.raises(UserError, match=r"data.held_out.task: .*'chain_summ'.*chain_sum"):
        make(ReasoningGymSource(source="reasoning_gym", task="chain_summ"), "data.held_out")


class _Waits(Verifier):
    """Lets other episodes in between reset and judgement."""

    async def judge(self, prompt, response_text):
        await asyncio.sleep(0.001 * (prompt.index % 5))
        return float(prompt.index), {"read": response_text}


def test_episodes_side_by_side_do_not_mix():
    environment = _Waits()

    async def play():
        prompts = [Prompt(i, "", [1]) for i in range(50)]
        return await asyncio.gather(*(grade(environment, p, f"r{p.index}") for p in prompts))

    assert asyncio.run(play()) == [(float(i), {"read": f"r{i}"}) for i in range(50)]


def test_reset_shows_the_prompt_and_one_step_ends_the_episode():
    async def play():
        environment = _Waits()
        observation = await environment.reset(Prompt(3, "text", [1]))
        return observation.text, await environment.step("a")

    assert asyncio.run(play()) == ("text", StepResult(None, 3.0, True, {"read": "a"}))


class _Breaks(Verifier):
    def __init__(self, result):
        self._result = result

    async def judge(self, prompt, response_text):
        if isinstance(self._result, Exception):
            raise self._result
        return self._result, {}


@pytest.mark.parametrize(
    ("result", "words"),
    [
        (KeyError("entry"), "prompt 17: the verifier raised KeyError"),
        (TimeoutError("slow"), "prompt 17: the verifier raised TimeoutError: slow"),
        (float("nan"), "prompt 17: the verifier returned the reward nan"),
        (float("inf"), "prompt 17: .* inf"),
    ],
)
def test_a_broken_verifier_never_becomes_a_reward(result, words):
    with pytest.raises(VerifierError, match=words):
        asyncio.run(grade(_Breaks(result), Prompt(17, "", [1]), "x"))


class _TwoTurns(_Waits):
    async def step(self, action):
        return StepResult(await self.reset(self._prompt), 1.0, False)


def test_an_unfinished_episode_is_not_graded():
    with pytest.raises(VerifierError, match="prompt 2: .* more turns"):
        asyncio.run(grade(_TwoTurns(), Prompt(2, "", [1]), "x"))
