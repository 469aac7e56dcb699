"""Decoding of turns: equal to the tokenizer's, in a process without transformers too."""

from __future__ import annotations

import pickle
import subprocess
import sys
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from megarl.data.tokenizer import TurnReader
from megarl.records import token_ids


def turn(tokenizer: Any, text: str) -> Any:
    return token_ids([*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id])


@pytest.mark.parametrize("raw", [False, True])
def test_text_is_the_tokenizers_own(tokenizer: Any, raw: bool) -> None:
    eos = tokenizer.eos_token
    reader = pickle.loads(pickle.dumps(TurnReader(tokenizer, (tokenizer.eos_token_id,))))
    ids = turn(tokenizer, f"1 + 2{eos}= 3 .")
    expected = f"1 + 2{eos}= 3 ." if raw else tokenizer.decode(ids, skip_special_tokens=True)
    assert reader(ids, raw=raw) == expected
    assert (eos in expected) == raw
    cut = ids[:-1]
    assert reader(cut, raw=raw) == tokenizer.decode(cut, skip_special_tokens=not raw)
    assert reader(ids[:0], raw=raw) == ""


def test_a_tokenizer_that_tidies_up_reads_for_itself(tokenizer: Any) -> None:
    tidies = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer,
        eos_token=tokenizer.eos_token,
        clean_up_tokenization_spaces=True,
    )
    ids = turn(tokenizer, "1 + 2 .")
    assert TurnReader(tidies, ())(ids) == tidies.decode(ids, skip_special_tokens=True)
    assert isinstance(TurnReader(tidies, ())._tokenizer, PreTrainedTokenizerFast)


def test_a_worker_that_reads_turns_loads_no_torch(tokenizer: Any) -> None:
    ids = turn(tokenizer, "1 + 2")
    data = pickle.dumps((TurnReader(tokenizer, (tokenizer.eos_token_id,)), ids))
    code = (
        "import pickle, sys; read, ids = pickle.load(sys.stdin.buffer); print(repr(read(ids)));"
        "print(*{'torch', 'transformers'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], input=data, capture_output=True, check=True)
    assert done.stdout.decode().splitlines() == [repr(tokenizer.decode(ids[:-1])), ""]
