"""`megarl chat`: what it answers is what transformers generates greedily from the same weights."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

from megarl.cli import main
from tests.end_to_end.conftest import FinishedRun
from tests.end_to_end.harness import ROOT

pytestmark = pytest.mark.timeout(1800)
QUESTIONS = ["What is 1 + 1?", "3 + 4 =", "Say 7"]


def chat(*arguments: str, questions: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "megarl", "chat", *arguments],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        input="".join(f"{each}\n" for each in questions),
        capture_output=True,
        text=True,
        timeout=1500,
    )


def greedy(model: Path, question: str, num_tokens: int) -> str:
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    lm = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, tokenize=False
    )
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
    found = lm.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=num_tokens, do_sample=False, pad_token_id=0
    )
    return tokenizer.decode(found[0, ids.shape[1] :], skip_special_tokens=True)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["hf", "vllm"])
def test_answers_are_the_models(sft_run: FinishedRun, backend: str) -> None:
    options = [
        "--backend",
        backend,
        "--max-new-tokens",
        "6",
        "--max-model-len",
        "64",
        "--kv-cache-gib",
        "0.05",
    ]
    done = chat(str(sft_run.dir), *options, "--json", questions=QUESTIONS)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    expected = [{"question": each, "answer": greedy(sft_run.dir / "hf", each, 6)} for each in QUESTIONS]
    assert rows == expected
    assert any(row["answer"] for row in rows)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--temperature", "-1"], "--temperature: expected a number >= 0 (got -1)"),
        (["--top-p", "0"], "--top-p: expected a number above 0, at most 1 (got 0)"),
        (["--max-new-tokens", "0"], "--max-new-tokens: expected an integer >= 1 (got 0)"),
        ([], "neither a run directory nor a model (no config.json in it)"),
    ],
)
def test_what_is_refused_before_an_engine_starts(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n"))
    assert main(["chat", str(tmp_path), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_no_question(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("\n"))
    assert main(["chat", str(tmp_path)]) == 2
    assert "no question on standard input" in capsys.readouterr().err
