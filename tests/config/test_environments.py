"""Configuration of environments: valid keys, and errors."""

from __future__ import annotations

from pathlib import Path

import pytest

from megarl.config.data import JsonlSource
from megarl.config.environments import CustomEnvironmentConfig, MathEnvironmentConfig
from megarl.config.grpo import GrpoConfig
from megarl.config.load import dump_config, load_config
from megarl.errors import UserError

TEXT = """
run: {dir: r}
model: {path: m}
data:
  train: {source: jsonl, path: d.jsonl, environment: ENVIRONMENT}
rollout: {num_prompts_per_step: 2, num_generations_per_prompt: 2, max_new_tokens: 8}
optimizer: {lr: 1e-4}
evaluation: {at_start: false, at_end: false}
training: {num_steps: 1}
"""


def load(folder: Path, environment: str, *overrides: str) -> GrpoConfig:
    path = folder / "c.yaml"
    path.write_text(TEXT.replace("ENVIRONMENT", environment))
    return load_config(GrpoConfig, path, overrides, check_files=False)


def test_a_path_alone_is_a_custom_environment_and_none_is_math(tmp_path: Path):
    config = load(tmp_path, "{path: 'a.b:C', arguments: {x: 1}}")
    source = config.data.train
    assert isinstance(source, JsonlSource)
    assert source.environment == CustomEnvironmentConfig(path="a.b:C", arguments={"x": 1})
    (tmp_path / "again.yaml").write_text(dump_config(config))
    assert load_config(GrpoConfig, tmp_path / "again.yaml", check_files=False) == config
    assert JsonlSource(source="jsonl", path="x").environment == MathEnvironmentConfig()


@pytest.mark.parametrize(
    ("environment", "line"),
    [
        ("{kind: maths}", "data.train.environment.kind: expected 'math' or .*'custom'.* (got 'maths')"),
        ("{arguments: {}}", "data.train.environment.kind: required but missing: 'math' or "),
        ("{kind: regex}", "data.train.environment.pattern: required but missing"),
        ("{kind: regex, pattern: '('}", "data.train.environment.pattern: is not a valid regular expression"),
        ("{kind: regex, pattern: a, format_reward: 0.5}", "format_reward: has no effect"),
        ("{kind: multiple_choice, choices: AAB}", "choices: must be distinct letters"),
        ("{path: a.b.C}", 'path: must have the form "package.module:Class"'),
        ("{path: 'a:b', argument: {}}", "did you mean data.train.environment.arguments"),
        ("{kind: judge, base_url: 'x', model: m}", "base_url: must be an http or https address"),
        ("{kind: judge, base_url: 'http://x', model: m, prompt: hi}", r"prompt: must contain {response}"),
        ("{kind: judge, base_url: 'http://x', model: m, score_pattern: x}", "needs a group"),
        (
            "{kind: judge, base_url: 'http://x', model: m, request_timeout_seconds: 30.0}",
            "3 requests and the pauses between them may take 93 s, but "
            "rollout.environments.timeout_seconds is 60",
        ),
    ],
)
def test_refused_with_the_field(tmp_path: Path, environment: str, line: str):
    with pytest.raises(UserError) as error:
        load(tmp_path, environment)
    [text] = str(error.value).splitlines()
    for part in line.split(".*"):
        assert part in text, text
    assert "c.yaml:5" in text
