"""Streams against the same data read whole: examples, order, resuming, bad rows, and memory."""

from __future__ import annotations

import json
import subprocess
import sys
import tracemalloc
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megarl.config.data import (
    EvalDataConfig,
    JsonlSource,
    LengthFilter,
    PromptDataConfig,
    SftHfSource,
)
from megarl.config.preference import (
    DpoConfig,
    PreferenceDataConfig,
    PreferenceJsonlSource,
)
from megarl.data.order import order_of
from megarl.data.preference import load_pairs
from megarl.data.prompts import load_prompts
from megarl.data.row_stream import RowReader
from megarl.data.rows import read_rows
from megarl.errors import UserError
from tests.config.rules import GYM, data_violations, violations
from tests.data.test_sources import COLUMNS, ROWS, file, load, write

SEED = 5
KINDS = [".jsonl", ".parquet", ".arrow", "saved", "saved-dict", "directory"]


@pytest.fixture
def hf_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf_cache")


def streamed(source, window=3):
    return source.model_copy(update={"streaming": True, "streaming_window": window})


def texts(data, indices):
    return [data[i].token_ids.tolist() for i in indices]


def drawn(data, count, state=None, position=0, step=2):
    """Draw ``count`` examples in batches of ``step``; return them and the state after each batch, as JSON."""
    if state is not None:
        data.stream.restore(json.loads(state))
    order, found, states = order_of(data, True, SEED), [], {}
    while len(found) < count:
        found += texts(data, order.batch(position, step))
        position += step
        states[position] = json.dumps(data.stream.place(position))
    return found, states


def expected_order(rows, window, epochs):
    """The row of each position: windows in turn, each permuted by (seed, epoch, window)."""
    walk = []
    for epoch in range(epochs):
        for number, first in enumerate(range(0, rows, window)):
            seeds = np.random.SeedSequence([SEED, epoch, number, 2])
            size = min(window, rows - first)
            walk += (np.random.RandomState(np.random.MT19937(seeds)).permutation(size) + first).tolist()
    return walk


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("window", [3, 7])
@pytest.mark.usefixtures("hf_cache")
def test_windows_are_permuted_and_a_run_goes_on_from_every_place(tokenizer, tmp_path, kind, window):
    source = write(tmp_path, kind)
    whole = texts(load(tokenizer, source), range(len(ROWS)))
    found, states = drawn(load(tokenizer, streamed(source, window)), 28)
    assert found == [whole[row] for row in expected_order(len(ROWS), window, 4)]
    for position in (4, 6, 14):
        again, _ = drawn(load(tokenizer, streamed(source, window)), 8, states[position], position)
        assert again == found[position : position + 8]


def test_without_shuffling_the_order_is_that_of_the_rows(tokenizer, tmp_path):
    source = write(tmp_path, ".jsonl")
    data = load(tokenizer, streamed(source))
    order = order_of(data, False, SEED).batch(0, 14)
    assert texts(data, order) == texts(load(tokenizer, source), range(7)) * 2


def test_what_lies_before_is_not_read_again(tokenizer, tmp_path):
    """The rows before the checkpoint's window are overwritten; a resumed run does not notice."""
    source = write(tmp_path, ".jsonl")
    _, states = drawn(load(tokenizer, streamed(source)), 4)
    expected, _ = drawn(load(tokenizer, streamed(source)), 7, states[4], 4, step=1)
    content = Path(source.path).read_bytes()
    start = json.loads(states[4])["place"]["offset"]
    assert content[:start].count(b"\n") == 3
    Path(source.path).write_bytes(b"?" * start + content[start:])
    data = load(tokenizer, streamed(source))
    assert drawn(data, 3, states[4], 4, step=1)[0] == expected[:3]
    with pytest.raises(UserError, match=r"rows\.jsonl:1: malformed JSON"):
        drawn(data, 4, states[4], 4, step=1)  # the next epoch


@pytest.mark.usefixtures("hf_cache")
def test_a_run_goes_on_with_the_commit_of_the_hub_that_it_began_with(tokenizer, tmp_path, monkeypatch):
    """The hub's newest commit reverses the rows; its two functions are replaced, the files are local."""
    for commit, rows in (("aaa", ROWS), ("bbb", ROWS[::-1])):
        (tmp_path / commit).mkdir()
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / commit / "train-00000-of-00001.parquet")
    newest, load_dataset = ["aaa"], datasets.load_dataset

    def info(self, repo, *, revision):
        assert (repo, revision) == ("org/sums", None)
        return SimpleNamespace(sha=newest[0])

    def read(name, subset, *, split, revision, streaming):
        assert (name, streaming) == ("org/sums", True)
        return load_dataset(str(tmp_path / revision), split=split, streaming=True)

    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", info)
    monkeypatch.setattr("datasets.load_dataset", read)
    source = streamed(SftHfSource(source="hf", dataset="org/sums", **COLUMNS))
    expected, states = drawn(load(tokenizer, source), 20)
    newest[0] = "bbb"
    assert drawn(load(tokenizer, source), 20)[0] != expected
    assert drawn(load(tokenizer, source), 16, states[4], 4)[0] == expected[4:]


@pytest.mark.usefixtures("hf_cache")
def test_a_hub_that_does_not_answer(tokenizer, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    source = streamed(SftHfSource(source="hf", dataset="org/sums"))
    with pytest.raises(
        UserError, match=r"data.train: cannot read split 'train' of org/sums: .*HF_HUB_OFFLINE"
    ):
        load(tokenizer, source)[0]


def test_bad_and_long_rows_of_a_window(tokenizer, jsonl):
    def row(n):
        return json.dumps({"prompt": "1" * n, "response": "2"})

    path = jsonl(row(1), "{", "[]", "{}", row(30), row(2), row(3))
    source = streamed(file(path), window=2)
    with pytest.raises(UserError, match=r":2: malformed JSON"):
        load(tokenizer, source, limit=20)[0]
    fields = {"on_bad_row": "skip", "filter": LengthFilter(too_long="drop")}
    data = load(tokenizer, source, limit=20, **fields)
    whole = load(tokenizer, file(path), limit=20, **fields)
    # The second window has no usable row and is passed over, in every epoch.
    assert texts(data, range(6)) == texts(whole, range(3)) * 2
    lines = [line for report in data.reports[:3] for line in report.lines()]
    assert lines[0] == "data.train, rows 1 to 2: 1 bad of 2 rows skipped (data.on_bad_row):"
    assert lines[2] == "data.train, rows 3 to 4: 2 bad of 2 rows skipped (data.on_bad_row):"
    assert "rows 5 to 6: 1 of 2 rows dropped for their length" in lines[5]
    with pytest.raises(UserError, match=r"no row is left to use\n.*rows 1 to 2: 2 bad of 2"):
        load(tokenizer, streamed(file(jsonl("{", "[", name="b.jsonl")), 2), on_bad_row="skip")[0]
    (empty := Path(path).with_name("empty.jsonl")).write_text("\n")
    with pytest.raises(UserError, match="data.train: holds no records"):
        load(tokenizer, streamed(file(empty)))[0]


def test_every_row_that_is_read_and_converted_is_progress(tokenizer, tmp_path):
    """Else a run whose window takes long would count as hung."""
    data, ticks = load(tokenizer, streamed(write(tmp_path, ".jsonl"))), []
    data.stream.tick = lambda: ticks.append(1)
    data.stream.window(0)
    assert len(ticks) == 3 + 3
    data.stream.window(6)
    assert len(ticks) == 7 + 7


def test_pairs(tokenizer, jsonl):
    rows = [{"prompt": f"{n} + 1?", "chosen": str(n + 1), "rejected": str(n + 2)} for n in range(5)]
    source = PreferenceJsonlSource(source="jsonl", path=jsonl(*map(json.dumps, rows)))

    def pairs(source):
        config = PreferenceDataConfig(train=source)
        return load_pairs(config, tokenizer, max_sequence_length=99, split="train")

    whole, data = pairs(source), pairs(streamed(source))
    assert [data[i] for i in range(10)] == [*whole, *whole]
    assert list(data.batch([4, 0])) == list(whole.batch([4, 0]))
    assert data.mismatched(1) == whole.mismatched(1)  # row 2
    other = data.mismatched(2)[0]  # row 0, the next one of its window
    assert tokenizer.decode(other.token_ids) == "<|user|>2 + 1?<|end|><|assistant|>1<|end|>"
    unpaired = jsonl(json.dumps({"prompt": "a", "completion": "b", "label": True}), name="u.jsonl")
    with pytest.raises(UserError, match=r"data.train.streaming: .*u.jsonl:1 is a row of unpaired preference"):
        pairs(streamed(PreferenceJsonlSource(source="jsonl", path=unpaired)))[0]


def test_prompts_have_the_numbers_of_their_rows(tokenizer, jsonl):
    rows = [{"prompt": f"{n} + 1?", "answer": n + 1} for n in range(5)]
    source = JsonlSource(source="jsonl", path=jsonl(json.dumps(rows[0]), "{", *map(json.dumps, rows[1:])))
    held_out = JsonlSource(source="jsonl", path=jsonl(json.dumps(rows[0]), name="held_out.jsonl"))

    def prompts(source, split="train"):
        config = PromptDataConfig(train=source, held_out=held_out, on_bad_row="skip")
        return load_prompts(config, tokenizer, max_prompt_tokens=30, split=split)

    whole, data = prompts(source), prompts(streamed(source, 2))
    assert [data[i] for i in range(10)] == [*whole, *whole]
    assert [p.index for p in whole] == [0, 1, 2, 3, 4]
    assert prompts(source, "held_out").unseen == []
    compared = prompts(streamed(source), "held_out")
    assert compared.unseen is None
    assert compared.not_compared == "they are streamed (data.train.streaming)"


def test_what_cannot_be_streamed(tmp_path):
    plain, stream = (
        {"source": "jsonl", "path": "a.jsonl"},
        {"source": "jsonl", "path": "b.jsonl", "streaming": True},
    )
    assert violations(data={"train": stream}) == []
    cases = {
        "data.held_out.streaming: rows to be evaluated are read whole": {
            "data": {"train": plain, "held_out": stream}
        },
        "data.train.sources.a.streaming: the sources of a mixture are read whole": {
            "data": {"train": {"source": "mixture", "sources": {"a": stream, "b": plain}}}
        },
        "data.cache_dir: keeps the tokens of all rows, and data.train.streaming": {
            "data": {"train": stream, "cache_dir": "c"}
        },
        "data.train.streaming_window: all rows are read at the start (got 5)": {
            "data": {"train": plain | {"streaming_window": 5}}
        },
        "data.train.streaming: a .csv file is read whole": {
            "data": {"train": {"source": "file", "path": "a.csv", "streaming": True}}
        },
        "data.train.streaming: needs a whole split": {
            "data": {"train": {"source": "hf", "dataset": "a/b", "split": "train[:9]", "streaming": True}}
        },
        "training.num_epochs: data.train.streaming leaves the number of rows unknown": {
            "data": {"train": stream},
            "training": {"num_epochs": 1.0, "batch_size": 4},
        },
    }
    for words, sections in cases.items():
        [violation] = violations(**sections)
        assert violation.startswith(words)
    pairs = {"data": {"train": stream}}
    assert violations(DpoConfig, **pairs) == []
    for name in ("path", "cache_dir"):
        [violation] = violations(DpoConfig, reference={name: "x"}, **pairs)
        assert violation.startswith(
            f"reference.{name}: streamed pairs get their reference logprobs step by step"
        )
    [violation] = violations(DpoConfig, data={"train": stream | {"row_format": "unpaired_preference"}})
    assert violation.startswith("data.train.streaming: the rows of a pair may lie anywhere")
    [violation] = data_violations(
        EvalDataConfig.model_validate({"held_out": GYM | {"seed": 9**9}, "train": stream})
    )
    assert violation.startswith("data.train.streaming: rows to be evaluated")


@pytest.mark.parametrize("kind", [".jsonl", ".parquet"])
def test_memory_is_that_of_a_window(tmp_path, kind):
    """Of 8 MB of rows a window of 50 is held, though Parquet has them in one row group."""
    rows = [{"text": f"{n:04}" * 500} for n in range(4000)]
    path = tmp_path / f"rows{kind}"
    if kind == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        pq.write_table(pa.Table.from_pylist(rows), path, use_dictionary=False)
    source = file(path)

    def peak(read):
        tracemalloc.start()
        try:
            count = read()
            return count, tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    def stream():
        reader, place, count = RowReader(source, "data.train"), {}, 0
        while True:
            rows, place = reader.read(place, 50)
            count += len(rows)
            assert pa.total_allocated_bytes() - before < 3 * 2**20
            if len(rows) < 50:
                return count

    before = pa.total_allocated_bytes()
    counts, peaks = zip(peak(stream), peak(lambda: len(list(read_rows(source, "data.train")))), strict=True)
    assert counts == (4000, 4000)
    assert peaks[0] < 2**20 < 6 * 2**20 < peaks[1]


_DRAW_ALL = """
import resource, sys
from megarl.config.data import SftDataConfig
from megarl.data.order import order_of
from megarl.data.sft import load_demonstrations
from megarl.data.tokenizer import load_tokenizer

path, model, streaming, count = sys.argv[1], sys.argv[2], sys.argv[3] == "True", int(sys.argv[4])
tokenizer = load_tokenizer(model)
tokenizer("warm up")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
source = {"source": "jsonl", "path": path, "streaming": streaming}
data = load_demonstrations(
    SftDataConfig.model_validate({"train": source, "format": {"chat_template": False}}),
    tokenizer, max_sequence_length=4096, split="train",
)
order, tokens = order_of(data, True, 1), 0
for position in range(0, count, 100):
    tokens += len(data.batch(order.batch(position, 100)).token_ids)
    if data.stream is not None:
        data.stream.place(position)
print(tokens, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


@pytest.mark.slow
def test_resident_memory_of_200_000_rows(tokenizer, tmp_path):
    """Every row is drawn once: the same tokens, in a fraction of the memory."""
    count = 200_000
    with (tmp_path / "rows.jsonl").open("w") as out:
        for n in range(count):
            out.write(json.dumps({"prompt": f"{n} + 1?", "response": f"It is {n + 1}. " * 12}) + "\n")
    tokenizer.save_pretrained(tmp_path / "model")
    found = {}
    for streaming in (True, False):
        arguments = [tmp_path / "rows.jsonl", tmp_path / "model", streaming, count]
        command = [sys.executable, "-c", _DRAW_ALL, *map(str, arguments)]
        out = subprocess.run(command, capture_output=True, text=True, check=True, timeout=1500).stdout
        tokens, mib = map(int, out.split())
        found[streaming] = mib
        print(f"streaming={streaming}: {tokens:,} tokens, {mib} MiB")
        assert tokens == found.setdefault("tokens", tokens)
    assert found[True] < found[False] / 2
