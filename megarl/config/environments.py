"""Settings of environments: what judges answers, and how its worker processes are run."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from megarl.config.section import (
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Section,
    Text,
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

    num_workers: PositiveInt = 1
    """Processes (Ray actors) that play episodes of one environment side by side."""
    timeout_seconds: PositiveFloat = 60.0
    """Longest a single call (judging a response, one turn) may take; then its process is ended."""
    start_timeout_seconds: PositiveFloat = 300.0
    """Longest a worker process may take to start."""
    max_retries: NonNegativeInt = 2
    """How often a failed episode is played again, what was sampled kept, before it is dropped."""
    max_dropped_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Share of a step's episodes that may be dropped; above it the run stops with the reason."""
    max_turns: PositiveInt = 16
    """Turns of the policy in one episode, for environments of several turns."""
    max_new_tokens_per_turn: PositiveInt | None = None
    """Longest turn; null: what is left of rollout.max_new_tokens, which holds for the whole episode."""


class MathEnvironmentConfig(Section):
    """Mathematical answers, compared as expressions by math-verify."""

    kind: Literal["math"] = "math"
    """Selects this environment."""
    extract: Literal["any", "boxed", "last_number"] = "any"
    """Where the answer stands: any form math-verify finds, the last boxed one, or the last number."""


class MultipleChoiceConfig(Section):
    """One letter out of several; the reference is the letter, or its position counted from 0."""

    kind: Literal["multiple_choice"]
    """Selects this environment."""
    choices: Annotated[str, Field(min_length=2, max_length=26)] = "ABCD"
    """The letters there are, in order."""
    choices_field: Text | None = None
    """Field of the source with the list of choices' texts, for numbers of choices that differ (null: all)."""


class RegexConfig(Section):
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


class JudgeConfig(Section):
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
    num_attempts: PositiveInt = 3
    """Requests per grading until one is answered with a score."""
    request_timeout_seconds: PositiveFloat = 15.0
    """Longest a request may take."""
    retry_seconds: PositiveFloat = 1.0
    """Pause before the second request; doubled before each further one."""
    max_concurrency: PositiveInt = 32
    """Requests of one worker at a time."""


class CustomEnvironmentConfig(Section):
    """An environment of your own, from a package that is installed or in the current directory."""

    kind: Literal["custom"] = "custom"
    """Selects this environment; may be left out where `path` is given."""
    path: Text
    """Where it is: "package.module:Class"."""
    arguments: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments of the class."""


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
    | Annotated[CustomEnvironmentConfig, Tag("custom")],
    Discriminator(_kind),
]
"""What judges the answers to a source's problems. A new kind is a class above and a line in
:func:`megarl.environments.make`."""
