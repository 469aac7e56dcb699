"""Settings of environments: what judges answers, and how its worker processes are run."""

from __future__ import annotations

import re
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Discriminator, Field, Tag

from megarl.config.dotted import is_dotted
from megarl.config.section import (
    NonNegativeFloat,
    NonNegativeInt,
    PathText,
    PositiveFloat,
    PositiveInt,
    Problems,
    ProcessCount,
    Seconds,
    Section,
    Text,
    at_most,
    rule,
)

JUDGE_PROMPT = """\
Grade a response to a question against the reference answer, from 0 (worthless) to 10 (as good as the
reference). Say in a sentence what decides it, then write a last line of the form "Score: N".

Question:
{question}

Reference answer:
{answer}

Response:
{response}
"""


class EnvironmentRuntime(Section):
    """Worker processes in which environments run, and what happens when they fail."""

    num_workers: ProcessCount = 1
    """Processes (Ray actors) that play episodes of one environment side by side."""
    timeout_seconds: Seconds = 60.0
    """Longest a single call (judging a response, one turn) may take; then its process is ended."""
    start_timeout_seconds: Seconds = 300.0
    """Longest a worker process may take to start."""
    max_retries: NonNegativeInt = 2
    """How often a failed episode is played again, what was sampled kept, before it is dropped."""
    max_dropped_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Share of a step's episodes that may be dropped; above it the run stops with the reason."""
    max_turns: PositiveInt = 16
    """Turns of the policy in one episode, for environments of several turns."""
    max_new_tokens_per_turn: PositiveInt | None = None
    """Longest turn; null: what is left of rollout.max_new_tokens, which holds for the whole episode."""


class Judging(Section):
    """Base of all environments, and what the rest of a configuration asks of them."""

    makes_problems: ClassVar[bool] = False
    """Whether it may be a data source."""
    needs_chat_template: ClassVar[bool] = False

    def within(self, limit: float) -> Problems:
        """Rule: one call ends by itself before ``limit``, rollout.environments.timeout_seconds."""
        yield from ()


class MathEnvironmentConfig(Judging):
    """Mathematical answers, compared as expressions by math-verify."""

    kind: Literal["math"] = "math"
    """Selects this environment."""
    extract: Literal["any", "boxed", "last_number"] = "any"
    """Where the answer stands: any form math-verify finds, the last boxed one, or the last number."""


class MultipleChoiceConfig(Judging):
    """One letter out of several; the reference is the letter, or its position counted from 0."""

    kind: Literal["multiple_choice"]
    """Selects this environment."""
    choices: Annotated[str, Field(min_length=2, max_length=26)] = "ABCD"
    """The letters there are, in order."""
    choices_field: Text | None = None
    """Field of the source with the list of choices' texts, for numbers of choices that differ (null: all)."""

    @rule
    def _letters(self) -> Problems:
        letters = self.choices
        if not letters.isascii() or not letters.isalpha() or len(set(letters.upper())) < len(letters):
            yield "choices", f"must be letters, each once (got {letters!r})"


class RegexConfig(Judging):
    """The form of a response, and what a part of it says."""

    kind: Literal["regex"]
    """Selects this environment."""
    pattern: Text
    """Python regular expression; the group `answer`, where it has one, is compared with the reference."""
    full_match: bool = True
    """The whole response must match; otherwise the last place that does counts."""
    ignore_case: bool = False
    """Whether upper and lower case are the same, in the pattern and the comparison."""
    format_reward: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Reward of a response that has the form but another answer; 1 is always that of a right one."""

    @rule
    def _pattern(self) -> Problems:
        found = _compiled(self.pattern)
        if isinstance(found, str):
            yield "pattern", found
        elif "answer" not in found.groupindex:
            why = "has no effect: environment.pattern has no group `answer`, so every match gets 1"
            yield from self.unused("format_reward", why, "pattern")


class JudgeConfig(Judging):
    """A language model that grades, behind an OpenAI-compatible endpoint."""

    kind: Literal["judge"]
    """Selects this environment."""
    base_url: Text
    """Where the endpoint is, e.g. http://127.0.0.1:8000/v1; /chat/completions is added."""
    model: Text
    """The judge's name there."""
    prompt: Text = JUDGE_PROMPT
    """What the judge is asked, with {question}, {answer} and {response}."""
    score_pattern: Text = r"(?im)^\s*score:\s*(-?\d+(?:\.\d+)?)"
    """Regular expression whose first group is the score; the last match in the judge's reply counts."""
    max_score: PositiveFloat = 10.0
    """The best score; rewards are scores divided by it, and scores outside [0, max_score] are failures."""
    api_key_variable: Text | None = None
    """Environment variable with the key to send; null sends none."""
    temperature: NonNegativeFloat = 0.0
    """The judge's temperature."""
    max_tokens: PositiveInt = 512
    """The judge's longest reply."""
    num_attempts: Annotated[int, Field(ge=1), at_most(100)] = 3
    """Requests per grading until one is answered with a score."""
    request_timeout_seconds: Seconds = 15.0
    """Longest a request may take."""
    retry_seconds: Seconds = 1.0
    """Pause before the second request; doubled before each further one."""
    max_concurrency: PositiveInt = 32
    """Requests of one worker at a time."""

    @rule
    def _request(self) -> Problems:
        if "{response}" not in self.prompt:
            yield "prompt", "must hold {response}: the judge would not see what it grades"
        if not re.match(r"https?://[^/]", self.base_url):
            yield "base_url", f"must be an http or https address (got {self.base_url!r})"
        found = _compiled(self.score_pattern)
        if isinstance(found, str):
            yield "score_pattern", found
        elif not found.groups:
            yield "score_pattern", f"needs a group, the score (got {self.score_pattern!r})"

    def within(self, limit: float) -> Problems:
        """All attempts and the pauses between them."""
        attempts, request = self.num_attempts, self.request_timeout_seconds
        longest = attempts * request + self.retry_seconds * (2 ** (attempts - 1) - 1)
        if longest >= limit:
            takes = f"{attempts} requests and the pauses between may take {longest:g} s"
            ends = f"rollout.environments.timeout_seconds = {limit:g} would end them"
            yield "request_timeout_seconds", f"{takes}, and {ends} (got {request:g})", "num_attempts"


class CodeConfig(Judging):
    """Programs judged by tests that run them in a sandbox."""

    kind: Literal["code"]
    """Selects this environment."""
    tests_field: Text = "tests"
    """Field of a problem with Python that raises where the program is wrong: one text, or a list of them."""
    cases_field: Text = "cases"
    """Field with runs instead: [{"input": standard input, "output": expected standard output}, ...]."""
    partial_credit: bool = False
    """Reward the share of tests passed; otherwise 1 for all of them and 0 for less."""
    isolation: Literal["auto", "bubblewrap", "namespaces", "landlock"] = "auto"
    """auto: the first of these that works here; the log and `megarl doctor` say which."""
    timeout_seconds: Seconds = 10.0
    """Longest run of one program (all `tests`, or one case), in wall-clock and in CPU time."""
    total_timeout_seconds: PositiveFloat = 45.0
    """Longest that the cases of a problem may run in all: those left then are not passed. With `tests`, what
    the program and they may take together: beyond it judging has failed."""
    memory_mib: PositiveInt = 512
    """Memory of a program: of each process by address space, of all together by what is resident."""
    disk_mib: PositiveInt = 16
    """Size of its working directory, which lies in memory."""
    output_kib: PositiveInt = 256
    """Output after which a program is ended."""
    num_processes: PositiveInt = 16
    """Processes and threads of one program."""
    max_concurrency: PositiveInt | None = None
    """Programs of one worker at a time; null: as many as there are cores."""

    @rule
    def _times(self) -> Problems:
        if self.timeout_seconds > self.total_timeout_seconds:
            least = f"must be at least timeout_seconds = {self.timeout_seconds:g}"
            yield "total_timeout_seconds", f"{least} (got {self.total_timeout_seconds:g})", "timeout_seconds"

    def within(self, limit: float) -> Problems:
        """All of one response's runs."""
        if (longest := self.total_timeout_seconds) >= limit:
            below = f"must be below rollout.environments.timeout_seconds = {limit:g}"
            yield "total_timeout_seconds", f"{below}, which would end the whole judging (got {longest:g})"


class NumberGuessingConfig(Judging):
    """Number guessing, a game of several turns that makes its own problems (`source: environment`)."""

    makes_problems = True

    kind: Literal["number_guessing"]
    """Selects this environment."""
    low: int = 1
    """Smallest number."""
    high: int = 100
    """Largest number."""
    max_guesses: PositiveInt = 8
    """Turns after which the game is lost."""
    turn_penalty: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Taken off the reward of 1 for each guess that missed."""

    @rule
    def _numbers(self) -> Problems:
        if self.low >= self.high:
            yield "high", f"must be above low (got {self.high})", "low"


class SlidingPuzzleConfig(Judging):
    """The sliding puzzle, a game of several turns that makes its own problems (`source: environment`)."""

    makes_problems = True

    kind: Literal["sliding_puzzle"]
    """Selects this environment."""
    size: Annotated[int, Field(ge=2, le=6)] = 3
    """Tiles along a side."""
    num_shuffles: PositiveInt = 10
    """Random moves that make a problem of the solved puzzle."""
    max_moves: PositiveInt = 16
    """Turns after which the game is lost."""
    illegal_penalty: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Taken off for a turn whose move cannot be made."""


class RewardModelConfig(Judging):
    """A reward model that scores responses, on the worker's CPU."""

    kind: Literal["reward_model"]
    """Selects this environment."""
    path: PathText
    """Sequence classification directory with one label, e.g. <run.dir>/hf of `megarl rm`."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type it computes in."""
    num_threads: PositiveInt = 1
    """CPU threads of each worker."""
    scale: PositiveFloat = 1.0
    """Rewards are scores times this."""


class CustomEnvironmentConfig(Judging):
    """An environment of your own, from a package that is installed or in the current directory."""

    makes_problems = True

    kind: Literal["custom"] = "custom"
    """Selects this environment; may be left out where `path` is given."""
    path: Text
    """Where it is: "package.module:Class"."""
    arguments: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments of the class."""

    @rule
    def _dotted(self) -> Problems:
        if not is_dotted(self.path):
            yield "path", f'is written "package.module:Class" (got {self.path!r})'


class FunctionConfig(Judging):
    """Rewards from plain functions of your own: (prompt, response, answer) -> float, all texts."""

    kind: Literal["function"]
    """Selects this environment."""
    paths: Annotated[list[Text], Field(min_length=1)]
    """Where they are: "package.module:function" each, installed or in the current directory."""
    weights: list[float] | None = None
    """What each value is multiplied with before they are added up (null: 1)."""

    @rule
    def _functions(self) -> Problems:
        for number, path in enumerate(self.paths):
            if not is_dotted(path):
                yield "paths", f'item {number} is written "package.module:function" (got {path!r})'
        if self.weights is not None and len(self.weights) != len(self.paths):
            counts = f"{len(self.weights)} for {len(self.paths)} functions"
            yield "weights", f"has one number for each of paths (got {counts})", "paths"


class ToolsConfig(Judging):
    """A loop of tool calls in the model's own form, and an answer that is judged."""

    needs_chat_template = True

    kind: Literal["tools"]
    """Selects this environment."""
    tools: Annotated[list[Literal["calculator", "python", "search"]], Field(min_length=1)]
    """What the model may call: arithmetic, Python in a sandbox, or a search over `corpus` (BM25)."""
    corpus: PathText | None = None
    """JSONL file with the documents of `search`: {"text": ..., "title": ...}, the title optional."""
    num_results: PositiveInt = 3
    """Documents that a search returns."""
    python_timeout_seconds: Seconds = 10.0
    """Longest run of one program."""
    error_penalty: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Taken off for each call that was wrong."""
    role: Literal["tool", "user"] = "tool"
    """Role of the message with a tool's result; `user` for chat templates that have no tool messages."""
    answer: MathEnvironmentConfig | RegexConfig | MultipleChoiceConfig = Field(
        default=MathEnvironmentConfig(), discriminator="kind"
    )
    """How the answer, the first turn without a call, is judged."""

    @rule
    def _corpus(self) -> Problems:
        if ("search" in self.tools) != (self.corpus is not None):
            found = f"{self.corpus!r} with tools {self.tools}"
            reason = f"is the documents of the tool search: set both or neither (got {found})"
            yield "corpus", reason, "tools"


def _compiled(pattern: str) -> re.Pattern[str] | str:
    """The regular expression, or what is wrong with it."""
    try:
        return re.compile(pattern)
    except re.error as error:
        return f"is no regular expression: {error} (got {pattern!r})"


def _kind(value: Any) -> str | None:
    if isinstance(value, Section):
        return str(getattr(value, "kind", None))
    if not isinstance(value, dict):
        return None
    kind = value.get("kind", "custom" if "path" in value else None)
    return kind if isinstance(kind, str) else None


EnvironmentConfig = Annotated[
    Annotated[MathEnvironmentConfig, Tag("math")]
    | Annotated[MultipleChoiceConfig, Tag("multiple_choice")]
    | Annotated[RegexConfig, Tag("regex")]
    | Annotated[JudgeConfig, Tag("judge")]
    | Annotated[RewardModelConfig, Tag("reward_model")]
    | Annotated[CodeConfig, Tag("code")]
    | Annotated[NumberGuessingConfig, Tag("number_guessing")]
    | Annotated[SlidingPuzzleConfig, Tag("sliding_puzzle")]
    | Annotated[FunctionConfig, Tag("function")]
    | Annotated[ToolsConfig, Tag("tools")]
    | Annotated[CustomEnvironmentConfig, Tag("custom")],
    Discriminator(_kind),
]
"""What judges the answers to a source's problems. A new kind is a class above and a line in
:func:`megarl.environments.make`."""


class EnvironmentSource(Section):
    """Problems that an environment makes itself: a game, or a class of your own with a method `problem`."""

    source: Literal["environment"]
    """Selects this kind of source."""
    environment: EnvironmentConfig
    """What makes the problems and plays them."""
    size: PositiveInt = 10_000
    """Number of problems."""
    seed: NonNegativeInt = 1
    """Problem i is made from seed + i; train and held-out ranges [seed, seed + size) must not overlap."""

    @property
    def problems(self) -> tuple[str, range]:
        """What is made, and from which seeds."""
        return f"kind {self.environment.kind}", range(self.seed, self.seed + self.size)

    @rule
    def _makes_problems(self) -> Problems:
        if not self.environment.makes_problems:
            kind = self.environment.kind
            yield "environment.kind", f"makes no problems of its own: use another data source (got {kind})"
