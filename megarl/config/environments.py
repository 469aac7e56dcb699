"""Settings of environments and of their worker processes."""

from __future__ import annotations

import re
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Discriminator, Field, Tag

from megarl.config.dotted import is_dotted
from megarl.config.dtypes import Dtype
from megarl.config.hub import ModelPath
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
    """Worker processes of the environments, and failure handling."""

    num_workers: ProcessCount = 1
    """Worker processes (Ray actors) per environment, which run episodes in parallel."""
    timeout_seconds: Seconds = 60.0
    """Time limit of one call (scoring a response, one turn); then its process is killed."""
    start_timeout_seconds: Seconds = 300.0
    """Time limit for the start of a worker process."""
    max_retries: NonNegativeInt = 2
    """Retries of a failed episode before it is dropped; sampled tokens are kept."""
    max_dropped_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Share of a step's episodes that may be dropped; above it the run stops with an error."""
    max_turns: PositiveInt = 16
    """Maximum turns of the policy per episode (multi-turn environments)."""
    max_new_tokens_per_turn: PositiveInt | None = None
    """Maximum tokens per turn; null: what remains of rollout.max_new_tokens, the limit of the episode."""


class Judging(Section):
    """Base of all environment sections."""

    makes_problems: ClassVar[bool] = False
    """Whether it generates problems, so that it can be a data source."""
    needs_chat_template: ClassVar[bool] = False

    def within(self, limit: float) -> Problems:
        """Rule: one call finishes within ``limit`` seconds, rollout.environments.timeout_seconds."""
        yield from ()


class MathEnvironmentConfig(Judging):
    """Mathematical answers, compared as expressions by math-verify."""

    kind: Literal["math"] = "math"
    """Selects this environment."""
    extract: Literal["any", "boxed", "last_number"] = "any"
    """Where to find the answer: any form math-verify finds, the last boxed one, or the last number."""


class MultipleChoiceConfig(Judging):
    """One letter out of several; the reference is the letter or its index from 0."""

    kind: Literal["multiple_choice"]
    """Selects this environment."""
    choices: Annotated[str, Field(min_length=2, max_length=26)] = "ABCD"
    """The letters, in order."""
    choices_field: Text | None = None
    """Field with the list of choice texts, when rows have different numbers of them (null: all letters)."""

    @rule
    def _letters(self) -> Problems:
        """`choices` are distinct letters."""
        letters = self.choices
        if not letters.isascii() or not letters.isalpha() or len(set(letters.upper())) < len(letters):
            yield "choices", f"must be distinct letters (got {letters!r})"


class RegexConfig(Judging):
    """A regular expression on the response, and optionally the answer in one of its groups."""

    kind: Literal["regex"]
    """Selects this environment."""
    pattern: Text
    """Python regular expression; its group `answer`, if any, is compared with the reference."""
    full_match: bool = True
    """The whole response must match; false: the last match in it counts."""
    ignore_case: bool = False
    """Ignore case in the pattern and in the comparison."""
    format_reward: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Reward of a response that matches but has a wrong answer; a correct answer always gets 1."""

    @rule
    def _pattern(self) -> Problems:
        """`pattern` compiles; `format_reward` needs a group `answer` in it."""
        found = _compiled(self.pattern)
        if isinstance(found, str):
            yield "pattern", found
        elif "answer" not in found.groupindex:
            why = "has no effect: environment.pattern has no group `answer`, so every match gets 1"
            yield from self.unused("format_reward", why, "pattern")


class JudgeConfig(Judging):
    """A judge model behind an OpenAI-compatible endpoint."""

    kind: Literal["judge"]
    """Selects this environment."""
    base_url: Text
    """URL of the endpoint, e.g. http://127.0.0.1:8000/v1; /chat/completions is appended."""
    model: Text
    """Name of the judge model at the endpoint."""
    prompt: Text = JUDGE_PROMPT
    """Prompt of the judge, with {question}, {answer} and {response}."""
    score_pattern: Text = r"(?im)^\s*score:\s*(-?\d+(?:\.\d+)?)"
    """Regular expression whose first group is the score; the last match in the judge's reply counts."""
    max_score: PositiveFloat = 10.0
    """Best score; the reward is score / max_score. A score outside [0, max_score] is a failure."""
    api_key_variable: Text | None = None
    """Environment variable that holds the API key; null: no key."""
    temperature: NonNegativeFloat = 0.0
    """Sampling temperature of the judge."""
    max_tokens: PositiveInt = 512
    """Maximum tokens of the judge's reply."""
    num_attempts: Annotated[int, Field(ge=1), at_most(100)] = 3
    """Maximum requests per response until one returns a score."""
    request_timeout_seconds: Seconds = 15.0
    """Time limit of one request."""
    retry_seconds: Seconds = 1.0
    """Pause before the second request; doubles with each further one."""
    max_concurrency: PositiveInt = 32
    """Concurrent requests per worker."""

    @rule
    def _request(self) -> Problems:
        """`prompt` contains {response}, `base_url` begins with http:// or https://, `score_pattern` has a
        group."""
        if "{response}" not in self.prompt:
            yield "prompt", "must contain {response}, the text to grade"
        if not re.match(r"https?://[^/]", self.base_url):
            yield "base_url", f"must be an http or https address (got {self.base_url!r})"
        found = _compiled(self.score_pattern)
        if isinstance(found, str):
            yield "score_pattern", found
        elif not found.groups:
            yield "score_pattern", f"needs a group that captures the score (got {self.score_pattern!r})"

    def within(self, limit: float) -> Problems:
        """Rule: all attempts and the pauses between them fit into ``limit`` seconds."""
        attempts, request = self.num_attempts, self.request_timeout_seconds
        longest = attempts * request + self.retry_seconds * (2 ** (attempts - 1) - 1)
        if longest >= limit:
            takes = f"{attempts} requests and the pauses between them may take {longest:g} s"
            ends = f"rollout.environments.timeout_seconds is {limit:g}"
            yield "request_timeout_seconds", f"{takes}, but {ends} (got {request:g})", "num_attempts"


class CodeConfig(Judging):
    """Programs, scored by tests in a sandbox."""

    kind: Literal["code"]
    """Selects this environment."""
    tests_field: Text = "tests"
    """Field with Python tests, a text or a list of them; a test that raises has failed."""
    cases_field: Text = "cases"
    """Field with input/output cases instead: [{"input": stdin, "output": expected stdout}, ...]."""
    partial_credit: bool = False
    """Reward: the share of passed tests; false: 1 if all pass, else 0."""
    isolation: Literal["auto", "bubblewrap", "namespaces", "landlock"] = "auto"
    """auto: the first that works on this machine; the log and `megarl doctor` name it."""
    timeout_seconds: Seconds = 10.0
    """Wall-clock and CPU time limit of one program run (all `tests`, or one case)."""
    total_timeout_seconds: PositiveFloat = 45.0
    """Time limit of all cases of a problem; cases not run by then have failed. With `tests`: of the program
    and its tests together; beyond it the verifier has failed."""
    memory_mib: PositiveInt = 512
    """Memory limit: address space of each process, resident memory of all processes together."""
    disk_mib: PositiveInt = 16
    """Size of its working directory, which is in memory."""
    output_kib: PositiveInt = 256
    """Output limit; above it the program is killed."""
    num_processes: PositiveInt = 16
    """Maximum processes and threads of one program."""
    max_concurrency: PositiveInt | None = None
    """Concurrent programs per worker; null: the number of cores."""

    @rule
    def _times(self) -> Problems:
        """`timeout_seconds` must not exceed `total_timeout_seconds`."""
        if self.timeout_seconds > self.total_timeout_seconds:
            least = f"must be at least timeout_seconds = {self.timeout_seconds:g}"
            yield "total_timeout_seconds", f"{least} (got {self.total_timeout_seconds:g})", "timeout_seconds"

    def within(self, limit: float) -> Problems:
        """Rule: all runs for one response fit into ``limit`` seconds."""
        if (longest := self.total_timeout_seconds) >= limit:
            below = f"must be below rollout.environments.timeout_seconds = {limit:g}"
            yield "total_timeout_seconds", f"{below}, the time limit of the whole call (got {longest:g})"


class NumberGuessingConfig(Judging):
    """Number guessing, a multi-turn game that generates its problems (`source: environment`)."""

    makes_problems = True

    kind: Literal["number_guessing"]
    """Selects this environment."""
    low: int = 1
    """Smallest number."""
    high: int = 100
    """Largest number."""
    max_guesses: PositiveInt = 8
    """Maximum turns; then the game is lost."""
    turn_penalty: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Subtracted from the reward of 1 for each wrong guess."""

    @rule
    def _numbers(self) -> Problems:
        """`low` is below `high`."""
        if self.low >= self.high:
            yield "high", f"must be above low (got {self.high})", "low"


class SlidingPuzzleConfig(Judging):
    """The sliding puzzle, a multi-turn game that generates its problems (`source: environment`)."""

    makes_problems = True

    kind: Literal["sliding_puzzle"]
    """Selects this environment."""
    size: Annotated[int, Field(ge=2, le=6)] = 3
    """Side length in tiles."""
    num_shuffles: PositiveInt = 10
    """Random moves that scramble the solved puzzle."""
    max_moves: PositiveInt = 16
    """Maximum turns; then the game is lost."""
    illegal_penalty: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Subtracted for each illegal move."""


class RewardModelConfig(Judging):
    """A reward model, run on the worker's CPU."""

    kind: Literal["reward_model"]
    """Selects this environment."""
    path: ModelPath
    """Sequence classification directory or hub id with one label, e.g. <run.dir>/hf of `megarl rm`."""
    dtype: Dtype = "float32"
    """Compute dtype."""
    num_threads: PositiveInt = 1
    """CPU threads per worker."""
    scale: PositiveFloat = 1.0
    """Factor from score to reward."""


class CustomEnvironmentConfig(Judging):
    """A user-defined environment, from an installed package or the current directory."""

    makes_problems = True

    kind: Literal["custom"] = "custom"
    """Selects this environment; optional when `path` is given."""
    path: Text
    """Import path, "package.module:Class"."""
    arguments: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments of its constructor."""

    @rule
    def _dotted(self) -> Problems:
        """`path` has the form package.module:Class."""
        if not is_dotted(self.path):
            yield "path", f'must have the form "package.module:Class" (got {self.path!r})'


class FunctionConfig(Judging):
    """Rewards from plain functions of your own: (prompt, response, answer) -> float, all texts."""

    kind: Literal["function"]
    """Selects this environment."""
    paths: Annotated[list[Text], Field(min_length=1)]
    """Where they are: "package.module:function" each, installed or in the current directory."""
    weights: list[float] | None = None
    """Weight of each value in the sum (null: 1)."""

    @rule
    def _functions(self) -> Problems:
        """Each of `paths` has the form package.module:function; `weights` has one number for each."""
        for number, path in enumerate(self.paths):
            if not is_dotted(path):
                yield "paths", f'item {number} is written "package.module:function" (got {path!r})'
        if self.weights is not None and len(self.weights) != len(self.paths):
            counts = f"{len(self.weights)} for {len(self.paths)} functions"
            yield "weights", f"has one number for each of paths (got {counts})", "paths"


class ToolsConfig(Judging):
    """Tool calls in the format of the model's chat template, then an answer that is scored."""

    needs_chat_template = True

    kind: Literal["tools"]
    """Selects this environment."""
    tools: Annotated[list[Literal["calculator", "python", "search"]], Field(min_length=1)]
    """Available tools: arithmetic, Python in a sandbox, or search over `corpus` (BM25)."""
    corpus: PathText | None = None
    """JSONL file with the documents of `search`: {"text": ..., "title": ...}, the title optional."""
    num_results: PositiveInt = 3
    """Documents returned by a search."""
    python_timeout_seconds: Seconds = 10.0
    """Time limit of one Python program."""
    error_penalty: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Subtracted for each invalid call."""
    role: Literal["tool", "user"] = "tool"
    """Role of messages with tool results; `user` for chat templates without tool messages."""
    answer: MathEnvironmentConfig | RegexConfig | MultipleChoiceConfig = Field(
        default=MathEnvironmentConfig(), discriminator="kind"
    )
    """Verifier of the answer, the first turn without a tool call."""

    @rule
    def _corpus(self) -> Problems:
        """The tool `search` and `corpus` are set together."""
        if ("search" in self.tools) != (self.corpus is not None):
            found = f"{self.corpus!r} with tools {self.tools}"
            reason = f"holds the documents of the tool search: set both or neither (got {found})"
            yield "corpus", reason, "tools"


def _compiled(pattern: str) -> re.Pattern[str] | str:
    """Compile the regular expression, or return the error message."""
    try:
        return re.compile(pattern)
    except re.error as error:
        return f"is not a valid regular expression: {error} (got {pattern!r})"


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
"""The environment of a data source. A new kind needs a class above and a line in
:func:`megarl.environments.make`."""


class EnvironmentSource(Section):
    """Problems generated by an environment: a game, or a user-defined class with a method `problem`."""

    source: Literal["environment"]
    """Selects this kind of source."""
    environment: EnvironmentConfig
    """The environment that generates the problems and runs the episodes."""
    size: PositiveInt = 10_000
    """Number of problems."""
    seed: NonNegativeInt = 1
    """Problem i has the seed seed + i; train and held-out ranges [seed, seed + size) must not overlap."""

    @property
    def problems(self) -> tuple[str, range]:
        """The kind of problem and the seeds."""
        return f"kind {self.environment.kind}", range(self.seed, self.seed + self.size)

    @rule
    def _makes_problems(self) -> Problems:
        """`environment` must be one that generates problems."""
        if not self.environment.makes_problems:
            kind = self.environment.kind
            yield "environment.kind", f"generates no problems: use another data source (got {kind})"
