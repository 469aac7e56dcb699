"""Every kind of source gives the same tokens; bad rows, lengths, cache, mixtures and their order."""

from __future__ import annotations

import collections
import csv
import json
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megarl.config.data import (
    JsonlSource,
    LengthFilter,
    PromptDataConfig,
    PromptFormat,
    PromptHfSource,
    PromptMixtureSource,
    SftDataConfig,
    SftHfSource,
    SftJsonlSource,
    SftMixtureSource,
    SftReasoningGymSource,
)
from megarl.config.environments import EnvironmentSource
from megarl.config.preference import PreferenceDataConfig, PreferenceJsonlSource
from megarl.data.order import MixtureOrder, PromptOrder, held_out_rows, order_of
from megarl.data.preference import load_pairs
from megarl.data.prompts import load_prompts
from megarl.data.sft import load_demonstrations
from megarl.errors import UserError

ROWS = [{"question": f"{i} + {i}?", "reply": str(2 * i)} for i in range(7)]
COLUMNS = {"prompt_field": "question", "response_field": "reply"}


def file(path, **fields) -> SftJsonlSource:
    return SftJsonlSource(source="file", path=str(path), **fields)


def load(tokenizer, source, limit=400, split="train", held_out=None, **fields):
    config = SftDataConfig(train=source, held_out=held_out, **fields)
    return load_demonstrations(config, tokenizer, max_sequence_length=limit, split=split)


def write(directory: Path, kind: str, rows=ROWS):
    """Write the rows as a file or directory of this kind; return the source that reads it."""
    path = directory / f"rows{kind}"
    table = pa.Table.from_pylist(rows)
    match kind:
        case ".jsonl":
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        case ".json":
            path.write_text(json.dumps(rows, indent=1))
        case ".parquet":
            pq.write_table(table, path, row_group_size=3)
        case ".csv":
            with path.open("w", newline="") as out:
                writer = csv.DictWriter(out, list(rows[0]))
                writer.writeheader()
                writer.writerows(rows)
        case ".arrow":
            with pa.OSFile(str(path), "wb") as out, pa.ipc.new_stream(out, table.schema) as writer:
                writer.write_table(table)
        case "saved":
            datasets.Dataset.from_list(rows).save_to_disk(path)
        case "saved-dict":
            datasets.DatasetDict({"test": datasets.Dataset.from_list(rows)}).save_to_disk(path)
        case "directory":
            path.mkdir()
            pq.write_table(table, path / "train-00000-of-00001.parquet")
    if kind.startswith("."):
        return file(path, **COLUMNS)
    split = {"saved-dict": "test"}.get(kind, "train")
    return SftHfSource(source="hf", dataset=str(path), split=split, **COLUMNS)


@pytest.fixture
def hf_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf_cache")


@pytest.mark.parametrize(
    "kind", [".jsonl", ".json", ".parquet", ".csv", ".arrow", "saved", "saved-dict", "directory"]
)
@pytest.mark.usefixtures("hf_cache")
def test_every_kind_of_source_gives_the_same_tokens(tokenizer, tmp_path, kind):
    found = load(tokenizer, write(tmp_path, kind))
    assert len(found) == len(ROWS)
    for sequence, row in zip(found, ROWS, strict=True):
        assert tokenizer.decode(sequence.token_ids) == (
            f"<|user|>{row['question']}<|end|><|assistant|>{row['reply']}<|end|>"
        )
    assert [line for report in found.reports for line in report.lines()] == []


@pytest.mark.usefixtures("hf_cache")
def test_prompts_and_pairs_read_them_too(tokenizer, tmp_path):
    rows = [{"q": "1 + 1?", "a": 2, "good": "2", "bad": "3"}]
    write(tmp_path, "saved", rows)
    source = PromptHfSource(
        source="hf", dataset=str(tmp_path / "rowssaved"), prompt_field="q", answer_field="a"
    )
    config = PromptDataConfig(train=source)
    [prompt] = load_prompts(config, tokenizer, max_prompt_tokens=99, split="train")
    assert (prompt.text, prompt.metadata["answer"]) == ("<|user|>1 + 1?<|end|><|assistant|>", "2")
    write(tmp_path, ".parquet", rows)
    columns = {"prompt_field": "q", "chosen_field": "good", "rejected_field": "bad"}
    pairs = PreferenceJsonlSource(source="file", path=str(tmp_path / "rows.parquet"), **columns)
    [pair] = load_pairs(PreferenceDataConfig(train=pairs), tokenizer, max_sequence_length=99, split="train")
    assert tokenizer.decode(pair.chosen.token_ids[pair.num_prompt_tokens :]) == "2<|end|>"
    assert tokenizer.decode(pair.rejected.token_ids[pair.num_prompt_tokens :]) == "3<|end|>"


@pytest.mark.parametrize(
    ("kind", "fields", "words"),
    [
        ("saved", {"split": "test"}, "data.train.split: .* holds one split"),
        ("saved", {"subset": "x"}, "data.train.subset: .* has none"),
        ("saved-dict", {"split": "nope"}, "data.train.split: .* has test"),
        ("directory", {"split": "nope"}, "data.train: cannot read split 'nope'"),
    ],
)
@pytest.mark.usefixtures("hf_cache")
def test_a_split_that_is_not_there(tokenizer, tmp_path, kind, fields, words):
    source = write(tmp_path, kind).model_copy(update=fields)
    with pytest.raises(UserError, match=words):
        load(tokenizer, source)


BAD_FILES = {
    "a.csv": (b"prompt,response\na,b\na,b,c\n", ":3: 3 cells, but the first line names 2"),
    "b.csv": (b"prompt,response\na,\n", ":2: no field 'response', or 'completion'"),
    "a.json": (b'{"prompt": 1}', "expected a list of objects"),
    "b.json": (b'[{"prompt": "a", "response": "b"}, 3]', " row 1: expected a JSON object"),
    "c.json": (b"[{]", ":1: malformed JSON"),
    "a.parquet": (b"PAR", "not a readable parquet file"),
    "a.arrow": (b"not arrow at all", "not a readable Arrow file"),
    "a.jsonl": (b"\n", "holds no records"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_files(tokenizer, tmp_path, name):
    content, words = BAD_FILES[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as caught:
        load(tokenizer, file(tmp_path / name))
    assert words in str(caught.value)


def test_bad_rows_are_counted_and_the_first_three_shown(tokenizer, jsonl):
    good = json.dumps({"prompt": "1", "response": "2"})
    path = jsonl(good, "{", "[]", '{"prompt": "a"}', good, '{"prompt": 3, "response": "b"}')
    with pytest.raises(UserError) as caught:
        load(tokenizer, file(path))
    lines = str(caught.value).splitlines()
    assert [line.removeprefix(path).split(":")[1] for line in lines[:3]] == ["2", "3", "4"]
    assert lines[3].startswith("data.train: 4 bad rows in all")

    found = load(tokenizer, file(path), on_bad_row="skip")
    assert [tokenizer.decode(s.token_ids) for s in found] == ["<|user|>1<|end|><|assistant|>2<|end|>"] * 2
    lines = found.reports[0].lines()
    assert lines[0] == "data.train: 4 bad of 6 rows skipped (data.on_bad_row); the first 3:"
    assert lines[1].startswith(f"  {path}:2: malformed JSON")
    with pytest.raises(UserError, match="no row is left"):
        load(tokenizer, file(jsonl("{", name="b.jsonl")), on_bad_row="skip")


def test_bad_references_of_problems_are_skipped_too(tokenizer, jsonl):
    rows = [{"prompt": "a", "answer": answer} for answer in ("1", "Paris", "2", "Rome")]
    source = JsonlSource(source="jsonl", path=jsonl(*map(json.dumps, rows)))
    with pytest.raises(UserError, match=r":2: .*Paris.*\n.*:4: .*Rome.*\n.* 2 bad rows in all"):
        load_prompts(PromptDataConfig(train=source), tokenizer, max_prompt_tokens=9, split="train")
    config = PromptDataConfig(train=source, on_bad_row="skip")
    found = load_prompts(config, tokenizer, max_prompt_tokens=9, split="train")
    assert [(p.index, p.metadata["answer"]) for p in found] == [(0, "1"), (1, "2")]
    assert found.unseen == [0, 1]
    assert "2 bad of 4 rows" in found.reports[0].lines()[0]


def test_lengths(tokenizer, jsonl):
    rows = [{"prompt": "1" * n, "response": "2"} for n in (1, 5, 9, 20)]  # and 5 tokens more
    source = file(jsonl(*map(json.dumps, rows)))
    with pytest.raises(UserError, match=":4: .* 25 tokens, but at most 20"):
        load(tokenizer, source, limit=20)
    limits = LengthFilter(min_tokens=7, max_tokens=13, too_long="drop")
    found = load(tokenizer, source, limit=20, filter=limits)
    assert [len(s.token_ids) for s in found] == [10]
    lines = found.reports[0].lines()
    assert lines[0] == "data.train: 3 of 4 rows dropped for their length (data.filter):"
    for line, words in zip(lines[1:], ["6 tokens, fewer", "14 tokens, more", "25 tokens, but"], strict=True):
        assert words in line
    # Generated problems are filtered as well: the same ones, at the same lengths.
    gym = SftReasoningGymSource(source="reasoning_gym", task="chain_sum", size=40)
    lengths = [len(s.token_ids) for s in load(tokenizer, gym)]
    middle = sorted(lengths)[20]
    kept = load(tokenizer, gym, filter=LengthFilter(max_tokens=middle))
    assert [len(s.token_ids) for s in kept] == [n for n in lengths if n <= middle]


def test_cache_is_keyed_by_content(tokenizer, jsonl, tmp_path):
    cache = tmp_path / "cache"
    rows = [json.dumps({"prompt": str(n), "response": "2"}) for n in range(5)]
    source = file(jsonl(*rows, "{"))
    fields = {"on_bad_row": "skip", "cache_dir": str(cache)}
    fresh = load(tokenizer, source, **fields)
    again = load(tokenizer, source, **fields)
    assert list(fresh) == list(again) == list(load(tokenizer, source, on_bad_row="skip"))
    assert "5 sequences written to" in fresh.reports[0].cache
    assert "5 sequences read from" in again.reports[0].cache
    assert fresh.reports[0].lines()[:2] == again.reports[0].lines()[:2]  # the bad row is told of each time

    def written(**changed) -> bool:
        found = load(tokenizer, changed.pop("source", source), **(fields | changed))
        return "written" in found.reports[0].cache

    assert written(format=PromptFormat(prompt_suffix="!"))
    assert written(limit=399)
    assert written(filter=LengthFilter(min_tokens=2))
    template, tokenizer.chat_template = tokenizer.chat_template, tokenizer.chat_template + "{# x #}"
    assert written()
    tokenizer.chat_template = template
    assert not written()
    Path(source.path).write_text("\n".join([*rows[:4], json.dumps({"prompt": "x", "response": "2"})]))
    assert written()
    assert not written()
    for kept in cache.iterdir():
        kept.write_bytes(kept.read_bytes()[:-3])
    found = load(tokenizer, source, **fields)
    assert "was damaged" in found.reports[0].cache
    assert len(found) == 5


def test_a_mixture_draws_its_shares_and_goes_on_where_it_was():
    sizes, weights = [10, 1000, 50], [2.0, 1.0, 0.01]
    order = MixtureOrder(sizes, weights, shuffle=True, seed=3)
    drawn = order.batch(0, 30_100)
    counts = collections.Counter(sum(item >= bound for bound in (10, 1010)) for item in drawn)
    for source, weight in enumerate(weights):
        assert abs(counts[source] - 30_100 * weight / 3.01) < 15
    # Every source walks through its rows once before it begins again, in another order.
    second = [item for item in drawn if 10 <= item < 1010]
    assert sorted(second[:1000]) == list(range(10, 1010))
    assert sorted(second[1000:2000]) == list(range(10, 1010))
    assert second[:1000] != second[1000:2000]
    # In any batches, and from any position, the same draws.
    resumed = MixtureOrder(sizes, weights, shuffle=True, seed=3)
    assert resumed.batch(12_345, 5000) == drawn[12_345:17_345]
    pieces = [resumed.batch(p, 7) for p in range(1000, 1070, 7)]
    assert [item for piece in pieces for item in piece] == drawn[1000:1070]
    assert MixtureOrder(sizes, weights, shuffle=True, seed=4).batch(0, 50) != drawn[:50]
    straight = MixtureOrder(sizes, weights, shuffle=False, seed=3).batch(0, 3000)
    assert [i for i in straight if i >= 10][:5] == [10, 11, 12, 13, 14]


def test_mixtures_of_data(tokenizer, jsonl):
    def named(name: str, count: int):
        rows = [json.dumps({"prompt": f"{name} {i}", "response": "2", "answer": "1"}) for i in range(count)]
        return jsonl(*rows, name=f"{name}.jsonl")

    paths = {"a": named("a", 3), "b": named("b", 5)}
    sources = {name: SftJsonlSource(source="jsonl", path=path) for name, path in paths.items()}
    gym = SftReasoningGymSource(source="reasoning_gym", task="chain_sum", size=4)
    source = SftMixtureSource(source="mixture", sources={**sources, "gym": gym})
    found = load(tokenizer, source)
    assert len(found) == 12
    assert "b 1" in tokenizer.decode(found[4].token_ids)
    assert isinstance(order_of(found, True, 1), PromptOrder)  # no weights: every row once per epoch
    assert held_out_rows(found, 4) == [0, 3, 6, 9]
    weighted = source.model_copy(update={"weights": {"gym": 1.0, "a": 2.0, "b": 1.0}})
    found = load(tokenizer, weighted)
    assert found.parts == [(3, 2.0), (5, 1.0), (4, 1.0)]
    assert isinstance(order_of(found, True, 1), MixtureOrder)

    parts = {name: JsonlSource(source="jsonl", path=path) for name, path in paths.items()}
    config = PromptDataConfig(train=PromptMixtureSource(source="mixture", sources=parts))
    prompts = load_prompts(config, tokenizer, max_prompt_tokens=99, split="train")
    assert [(p.index, p.metadata["source"]) for p in prompts][2:4] == [(2, "a"), (3, "b")]
    bad = {**sources, "bad": SftJsonlSource(source="jsonl", path=jsonl("{", name="bad.jsonl"))}
    with pytest.raises(UserError, match=r"bad.jsonl:1: malformed"):
        load(tokenizer, SftMixtureSource(source="mixture", sources=bad))


TWICE = '{"question": "1 + 1?", "reply": "2", "reply": "3"}'
DEEP = '{"question": ' + "[" * 100_000 + "]" * 100_000 + ', "reply": "2"}'
DIGITS = '{"question": "1 + 1?", "reply": ' + "9" * 5_000 + "}"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (TWICE, "the key 'reply' occurs twice in an object"),
        (DEEP, "its values are nested too deeply"),
        (DIGITS, "limit"),
    ],
    ids=["twice", "deep", "digits"],
)
def test_json_that_would_lose_or_break_something_is_a_row_error(tokenizer, tmp_path, row, message):
    lines, whole = tmp_path / "rows.jsonl", tmp_path / "rows.json"
    lines.write_text(json.dumps(ROWS[0]) + "\n" + row + "\n")
    whole.write_text(f"[{json.dumps(ROWS[0])}, {row}]")
    with pytest.raises(UserError, match=f"rows.jsonl:2: .*{message}"):
        load(tokenizer, file(lines, **COLUMNS))
    with pytest.raises(UserError, match=f"rows.json: .*{message}"):
        load(tokenizer, file(whole, **COLUMNS))


def test_a_column_that_occurs_twice_is_refused(tokenizer, tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("question,reply,reply\n1 + 1?,2,3\n")
    with pytest.raises(UserError, match="rows.csv:1: the column 'reply' occurs twice"):
        load(tokenizer, file(path, **COLUMNS))


@pytest.mark.usefixtures("hf_cache")
def test_the_part_of_a_dataset_that_is_read(tokenizer, tmp_path, monkeypatch):
    """Two subsets of two splits, as a directory of the hub has them; the revision goes to the library."""
    for number, name in enumerate(("red", "blue")):
        for split, count in (("train", 3), ("test", 2)):
            rows = [{"question": f"{name} {split} {i}?", "reply": str(number)} for i in range(count)]
            (tmp_path / name).mkdir(exist_ok=True)
            (tmp_path / name / f"{split}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    files = "".join(
        f"- config_name: {name}\n  data_files:\n"
        + "".join(f"  - split: {split}\n    path: {name}/{split}.jsonl\n" for split in ("train", "test"))
        for name in ("red", "blue")
    )
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n{files}---\n")

    def texts(**fields: str) -> list[str]:
        source = SftHfSource(source="hf", dataset=str(tmp_path), **COLUMNS, **fields)
        return [tokenizer.decode(s.token_ids).split("?")[0] for s in load(tokenizer, source)]

    assert texts(subset="red") == [f"<|user|>red train {i}" for i in range(3)]
    assert texts(subset="blue", split="test") == [f"<|user|>blue test {i}" for i in range(2)]

    asked = []

    def load_dataset(path, name, **options):
        asked.append((path, name, options))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    for fields, revision in (({}, None), ({"revision": "v1.2"}, "v1.2")):
        source = SftHfSource(source="hf", dataset="somebody/sums", subset="red", **COLUMNS, **fields)
        assert len(load(tokenizer, source)) == len(ROWS)
        assert asked.pop() == (
            "somebody/sums",
            "red",
            {"split": "train", "revision": revision, "streaming": False},
        )


def test_problems_that_an_environment_makes_are_those_of_its_seeds(tokenizer):
    def answers(**fields: int) -> list[str]:
        environment = {"kind": "number_guessing", "low": 1, "high": 10**6}
        source = EnvironmentSource.model_validate(
            {"source": "environment", "environment": environment, **fields}
        )
        found = load_prompts(PromptDataConfig(train=source), tokenizer, max_prompt_tokens=999, split="train")
        return [prompt.metadata["answer"] for prompt in found]

    one = answers(seed=5, size=4)
    assert len(set(one)) == 4
    assert answers(seed=6, size=3) == one[1:]
    assert answers(seed=5, size=2) == one[:2]
