"""An environment without training: `megarl env try`, and the check of it in a dry run.

Episodes run in this process, on a given answer instead of a policy's.
"""

from __future__ import annotations

import argparse
import asyncio
import copy
import json
import sys
import traceback
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

from megarl.config.data import parts_of
from megarl.config.evaluate import EvalConfig
from megarl.config.online import OnlineConfig
from megarl.data.stream import beginning
from megarl.environments import make
from megarl.environments.base import Environment, is_one_step
from megarl.errors import UserError
from megarl.records import Prompt
from megarl.terminal import one_line, printable, working

_NOT_ASKED = {
    "judge": "its endpoint is not asked here",
    "reward_model": "the reward model is not loaded here",
}
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class TriedTurn:
    """One turn: the given action, and what the environment made of it; ``observation`` None: it is over."""

    action: str
    reward: float
    observation: str | None
    info: dict[str, Any]


@dataclass(slots=True)
class TriedEpisode:
    """An episode of given actions; ``reward`` is the sum over its turns."""

    prompt: str
    answer: str
    turns: list[TriedTurn] = field(default_factory=list)
    done: bool = False

    @property
    def reward(self) -> float:
        """Sum of the turns' rewards."""
        return sum(turn.reward for turn in self.turns)


# --- checks --------------------------------------------------------------------------------------


def check_environments(source: Any, at: str, data: Any, limit: float) -> Iterator[str]:
    """Make the environments of a source and try each on its first problem; yield a line for each.

    Args:
        source: the data source.
        at: its configuration path.
        data: its prompts.
        limit: seconds for a call.

    Raises:
        UserError: an environment cannot be made, or fails on an answer.
    """
    starts = data.starts
    for (name, part), start in zip(parts_of(source, at), starts, strict=True):
        kind = _kind(part)
        if kind in _NOT_ASKED:
            yield f"{name}: {kind}; {_NOT_ASKED[kind]}"
            continue
        yield f"{name}: {kind}; {_checked(make(part, name), data[start], name, limit)}"


def _checked(environment: Environment, prompt: Prompt, name: str, limit: float) -> str:
    answer = str(prompt.metadata.get("answer") or "")
    if not is_one_step(environment):
        _call(copy.copy(environment).reset(prompt), f"{name}: reset", limit)
        return "several turns; an episode starts"
    found = []
    for what, response in (("the first problem's reference answer", answer), ("an empty response", "")):
        if what.startswith("an") or answer:
            reward = _try(environment, prompt, response, name, limit)
            found.append(f"{what} gets {reward:g}")
    return ", ".join(found)


def _try(environment: Environment, prompt: Prompt, response: str, name: str, limit: float) -> float:
    episode = copy.copy(environment)
    _call(episode.reset(prompt), f"{name}: reset", limit)
    return float(_call(episode.step(response), f"{name}: step", limit).reward)


def _kind(part: Any) -> str:
    environment = getattr(part, "environment", None)
    return str(environment.kind) if environment is not None else f"reasoning_gym {part.task}"


def _call(work: Coroutine[Any, Any, _T], what: str, limit: float | None) -> _T:
    """Run a coroutine of the user's environment.

    Raises:
        UserError: it raised, which is shown with its traceback, or a call had no answer in time.
    """

    async def limited() -> _T:
        return await asyncio.wait_for(work, limit)

    try:
        return asyncio.run(limited())
    except UserError:
        raise
    except TimeoutError:
        raise UserError(f"{what}: no answer within rollout.environments.timeout_seconds") from None
    except Exception as error:
        traceback.print_exc()
        raise UserError(f"{what} raised {type(error).__name__}: {one_line(str(error))}") from error


# --- megarl env try ------------------------------------------------------------------------------


def run(options: argparse.Namespace) -> int:
    """Run one episode on the answers given or typed; return the exit code."""
    from megarl.config.infer import load_inferred
    from megarl.jobs import JOBS
    from megarl.loops.model_files import read_model

    if options.problem < 0:
        raise UserError(f"--problem: expected a whole number >= 0 (got {options.problem})")
    online = [job for job in JOBS.values() if job.data.noun == "problems"]
    with working("reading model, data and environment"):
        jobs, config = load_inferred(
            options.config, options.overrides, online, options.job, check_weights=False
        )
        assert isinstance(config, OnlineConfig | EvalConfig)
        split = options.split or ("train" if getattr(config.data, "train", None) is not None else "held_out")
        source = getattr(config.data, split, None)
        if source is None:
            raise UserError(f"data.{split}: missing, nothing to try")
        _, tokenizer, longest = read_model(config)
        data = beginning(jobs[0].data.loader()(config, tokenizer, longest, split))
        if options.problem >= len(data):
            of = (
                f" in the first {source.streaming_window:,} rows"
                if getattr(source, "streaming", False)
                else ""
            )
            raise UserError(f"--problem: data.{split} has {len(data)} problems{of} (got {options.problem})")
        prompt = data[options.problem]
        limit = config.rollout.environments.timeout_seconds
        environment = make(source, f"data.{split}")
    answers = _Answers(options, prompt, one_step=is_one_step(environment))
    tell = (lambda *_: None) if options.json else _show
    episode = play(
        environment, prompt, answers, f"data.{split}", limit, config.rollout.environments.max_turns, tell
    )
    if options.json:
        print(json.dumps(asdict(episode) | {"reward": episode.reward}, default=str, indent=1))
    else:
        print(f"reward: {episode.reward:g}" + ("" if episode.done else " so far; the episode is not over"))
    return 0


def play(
    environment: Environment,
    prompt: Prompt,
    next_action: Callable[[], str | None],
    name: str,
    limit: float,
    max_turns: int,
    tell: Callable[[str, str], None],
) -> TriedEpisode:
    """Run an episode until it is over, ``next_action`` returns None, or ``max_turns``.

    ``tell`` gets (label, text) of everything that is read or scored, as it happens.
    """
    result = TriedEpisode(prompt.text, str(prompt.metadata.get("answer") or ""))
    tell("prompt", result.prompt)
    tell("reference answer", result.answer or "none")
    episode = copy.copy(environment)

    async def turns() -> None:
        await asyncio.wait_for(episode.reset(prompt), limit)
        while not result.done and len(result.turns) < max_turns:
            action = await asyncio.to_thread(next_action)
            if action is None:
                break
            tell("response", action)
            step = await asyncio.wait_for(episode.step(action), limit)
            seen = None if step.observation is None else step.observation.text
            result.turns.append(TriedTurn(action, float(step.reward), seen, dict(step.info)))
            result.done = step.done
            for part, value in step.info.items():
                tell(f"  {part}", str(value))
            if seen is not None:
                tell("environment", seen)

    _call(turns(), name, None)  # each call has its limit, a person who types has none
    if not result.turns:
        raise UserError("no answer was given: --answer TEXT, --reference, or text on standard input")
    return result


class _Answers:
    """Actions in turn: of --answer, the reference answer, or standard input.

    A verifier reads all of a pipe as one response; an environment of several turns reads a line per turn.
    """

    def __init__(self, options: argparse.Namespace, prompt: Prompt, *, one_step: bool) -> None:
        self._given = list(options.answer or [])
        if options.reference:
            self._given = [str(prompt.metadata.get("answer") or "")]
        self._ends = bool(self._given)
        self._one_step = one_step

    def __call__(self) -> str | None:
        if self._given:
            return self._given.pop(0)
        if self._ends:
            return None
        if sys.stdin.isatty():
            print("your response (end it with an empty line): ", flush=True)
            lines = list(iter(sys.stdin.readline, "\n"))
            text = "".join(lines).removesuffix("\n")
            return text if lines and lines[0] else None
        if self._one_step:
            self._ends = True
            return sys.stdin.read().removesuffix("\n")
        return sys.stdin.readline().removesuffix("\n") or None


def _show(label: str, text: str) -> None:
    text = printable(text)
    gap = "\n" if "\n" in text.strip("\n") else " "
    print(f"{label}:{gap}{text}", flush=True)
