"""Inputs of a run apart from its configuration: changes are detected and reported by key and file."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from megarl.config.data import SftDataConfig
from megarl.config.environments import FunctionConfig
from megarl.config.grpo import GrpoConfig
from megarl.jobs import JOBS
from megarl.runs import inputs
from megarl.runs.inputs import CODE_KEYS, FILE_KEYS, changes, find_inputs

READS_NOTHING = {
    "dir",  # run.dir, written
    "cache_dir",  # written, by content of what it was made of
    "num_shared_prefix_tokens",
    "chat_template_kwargs",  # values for the template
}


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> GrpoConfig:
    """A run that reads a file, two model directories, a package's code and a function's."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text('{"prompt": "1", "answer": "1"}\n' * 50)
    (tmp_path / "docs.jsonl").write_text('{"text": "a"}\n')
    for name in ("model", "judge"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "tokenizer.json").write_text("{}")
        (tmp_path / name / "chat_template.jinja").write_text("{{ messages }}")
    (tmp_path / "own_inputs").mkdir()
    (tmp_path / "own_inputs" / "__init__.py").write_text("")
    (tmp_path / "own_inputs" / "score.py").write_text("X = 1\n")
    (tmp_path / "own_inputs" / "helper.py").write_text("Y = 1\n")
    (tmp_path / "own_loss.py").write_text("def f(tokens): ...\n")

    def source(environment: dict[str, Any]) -> dict[str, Any]:
        return {"source": "jsonl", "path": "rows.jsonl", "environment": environment}

    return GrpoConfig.model_validate(
        {
            "run": {"dir": "run"},
            "model": {"path": "model"},
            "data": {
                "train": {
                    "source": "mixture",
                    "sources": {
                        "a": source({"kind": "custom", "path": "own_inputs.score:X"}),
                        "b": source({"kind": "reward_model", "path": "judge"}),
                        "c": source({"kind": "tools", "tools": ["search"], "corpus": "docs.jsonl"}),
                    },
                }
            },
            "rollout": {"num_prompts_per_step": 2, "num_generations_per_prompt": 2, "max_new_tokens": 4},
            "algorithm": {"loss": "own_loss:f"},
            "training": {"num_steps": 1},
            "optimizer": {"lr": 1e-3},
        }
    )


EDITS = {
    "rows.jsonl": [f"data.train.sources.{name}.path: rows.jsonl has changed" for name in "abc"],
    "docs.jsonl": ["data.train.sources.c.environment.corpus: docs.jsonl has changed"],
    "model/tokenizer.json": ["model.path: tokenizer.json has changed"],
    "model/chat_template.jinja": ["model.path: chat_template.jinja has changed"],
    "judge/tokenizer.json": ["data.train.sources.b.environment.path: tokenizer.json has changed"],
    "own_inputs/score.py": ["data.train.sources.a.environment.path: own_inputs/score.py has changed"],
    "own_inputs/helper.py": ["data.train.sources.a.environment.path: own_inputs/helper.py has changed"],
    "own_loss.py": ["algorithm.loss: own_loss.py has changed"],
    "model/added.json": ["model.path: added.json is new"],
}


@pytest.mark.parametrize("name", EDITS)
def test_each_change_is_told(tmp_path: Path, config: GrpoConfig, name: str) -> None:
    before = find_inputs(config)
    file = tmp_path / name
    content = bytearray(file.read_bytes() if file.exists() else b"{}")
    content[len(content) // 2] ^= 1
    file.write_bytes(content)  # as long as before
    expected = [f"{line} since this run began" for line in EDITS[name]]
    assert changes(before, find_inputs(config, before)) == expected
    file.unlink()
    gone = changes(before, find_inputs(config, before))
    assert all("is gone" in line for line in gone) or name in ("rows.jsonl", "docs.jsonl", "model/added.json")


def test_what_was_only_touched_or_not_read_again_is_no_change(
    tmp_path: Path, config: GrpoConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = find_inputs(config)
    os.utime(tmp_path / "rows.jsonl", ns=(1, 1))
    assert changes(before, find_inputs(config, before)) == []
    monkeypatch.setattr(inputs, "_content", lambda path: pytest.fail(f"{path} is read again"))
    monkeypatch.undo()
    after = find_inputs(config, before)
    monkeypatch.setattr(inputs, "_content", lambda path: pytest.fail(f"{path} is read again"))
    assert find_inputs(config, after) == after


def test_packages_that_make_data_count(config: GrpoConfig) -> None:
    before = find_inputs(config)
    before["package reasoning-gym"] = {"version": "0.0.1"}
    [line] = changes(before, find_inputs(config))
    assert line.startswith("reasoning-gym is ")
    assert line.endswith(", and was 0.0.1 when this run began")


def test_large_weights_are_sampled_and_data_is_not(
    tmp_path: Path, config: GrpoConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inputs, "_SAMPLED_ABOVE", 2**20)
    weights, data = tmp_path / "model" / "model.safetensors", tmp_path / "rows.jsonl"
    for file in (weights, data):
        file.write_bytes(bytes(64 * 2**20))
    before = find_inputs(config)
    for file, place in ((weights, -1), (data, 40_000_001)):
        content = bytearray(file.read_bytes())
        content[place] = 1
        file.write_bytes(content)
    told = changes(before, find_inputs(config, before))
    assert "model.path: model.safetensors has changed since this run began" in told
    assert f"{EDITS['rows.jsonl'][0]} since this run began" in told


def test_a_large_streamed_file_is_sampled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its beginning, its end and its size are looked at; of one that is read whole, every byte."""
    monkeypatch.setattr(inputs, "_SAMPLED_ABOVE", 2**20)
    monkeypatch.setattr(inputs, "_SAMPLE", 16)
    path = tmp_path / "rows.jsonl"
    size = 2 * 2**20
    edits = {"first": (0, size), "last": (size - 1, size), "longer": (0, size + 1), "between": (10**6, size)}

    def told(streaming: bool, place: int, length: int) -> bool:
        path.write_bytes(bytes(size))
        source = {"source": "jsonl", "path": str(path), "streaming": streaming}
        data = SftDataConfig.model_validate({"train": source})
        before = find_inputs(data)
        content = bytearray(length)
        content[place] = length == size
        path.write_bytes(content)
        lines = changes(before, find_inputs(data, before))
        assert lines in ([], ["train.path: rows.jsonl has changed since this run began"])
        return bool(lines)

    assert [name for name, edit in edits.items() if told(True, *edit)] == ["first", "last", "longer"]
    assert told(False, *edits["between"])


def _fields(kind: Any, seen: set[Any]) -> Iterator[str]:
    """Every field name of a section and of those that its fields can hold."""
    for part in [kind, *getattr(kind, "__args__", ())]:
        if isinstance(part, type) and issubclass(part, BaseModel):
            if part in seen:
                continue
            seen.add(part)
            for name, field in part.model_fields.items():
                yield name
                yield from _fields(field.annotation, seen)
        elif part is not kind:
            yield from _fields(part, seen)


def test_every_key_that_names_a_file_is_looked_at() -> None:
    """A new key must be an input, or be listed as none."""
    names = {name for job in JOBS.values() for name in _fields(job.root(), set())}
    telling = ("path", "paths", "file", "dir", "corpus", "dataset", "template")
    suspects = {name for name in names if any(word in name.split("_") for word in telling)}
    assert suspects - set(FILE_KEYS) - set(CODE_KEYS) <= READS_NOTHING
    assert {"path", "corpus", "directory", "dataset", "chat_template"} <= names


def test_code_named_in_a_list_is_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The functions of `kind: function`."""
    (tmp_path / "rewards_of_inputs.py").write_text("def a(p, r, x): return 1\ndef b(p, r, x): return 0\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    found = find_inputs(FunctionConfig(kind="function", paths=["rewards_of_inputs:a", "rewards_of_inputs:b"]))
    assert set(found["paths[0]"]) == set(found["paths[1]"]) == {"rewards_of_inputs.py"}
