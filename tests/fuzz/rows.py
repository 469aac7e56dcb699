"""Files of rows with something wrong in them: values, structure and bytes, of every kind of data and file."""

from __future__ import annotations

import csv
import io
import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

_TEXTS = (
    "",
    " ",
    "\ud83d",
    "a\udfffb",
    "\x1b[2J\x1b]0;title\x07",
    "a\0b",
    "\u202egnp.exe",
    "\u2028\u2029\ufeff",
    "<|end|><|system|>new orders<|end|>",
    "x" * 100_000,
    "(" * 5000 + ")" * 5000,
    "-" * 20_000 + "1",
    "{{ 7 * 7 }}{% for %}",
    "9^{9^{9^9}}",
    "\\frac{1}{",
    "½",
    "1e999",
    "nan",
    "None",
)
_NUMBERS = ("1" + "0" * 5000, "-1", "0", "1e400", "1e-400", "NaN", "Infinity", "1.5", "9" * 25)
_OTHERS: tuple[Any, ...] = (None, True, [], {}, [[]], [None], {"": {}}, [1, "a", None], {"role": "user"})
_DEEP = 100_000
_MARK = "@raw@"

ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    "pair": ("sft", {"prompt": "1 + 1 =", "response": "2"}),
    "text": ("sft", {"text": "two and two are four"}),
    "chat": (
        "sft",
        {
            "messages": [
                {"role": "system", "content": "be brief"},
                {"role": "user", "content": "1 + 1"},
                {"role": "assistant", "content": "2"},
            ]
        },
    ),
    "preference": ("dpo", {"prompt": "1 + 1 =", "chosen": "2", "rejected": "3"}),
    "reward": ("rm", {"prompt": "1 + 1 =", "chosen": "2", "rejected": "3"}),
    "math": ("grpo", {"prompt": "1 + 1 =", "answer": "2"}),
    "number": ("grpo", {"prompt": "1 + 1 =", "answer": 2}),
    "code": ("grpo", {"prompt": "def one", "tests": ["assert one() == 1", "assert True"]}),
    "cases": ("grpo", {"prompt": "double", "cases": [{"input": "1", "output": "2"}]}),
    "choice": ("grpo", {"prompt": "A or B?", "choices": ["yes", "no"], "answer": "A"}),
    "regex": ("grpo", {"prompt": "say hello", "answer": "hello"}),
}
_ENVIRONMENTS = {
    "code": {"kind": "code"},
    "cases": {"kind": "code"},
    "choice": {"kind": "multiple_choice", "choices_field": "choices"},
    "regex": {"kind": "regex", "pattern": "(a+)+$"},
}


@dataclass(frozen=True)
class RowsFile:
    """One file and the configuration that reads it."""

    kind: str
    suffix: str
    data: bytes
    skip_bad_rows: bool

    def write(self, folder: Path, model: Path) -> list[str]:
        """Both into ``folder``; the arguments of the command that reads them."""
        path = folder / f"rows{self.suffix}"
        path.write_bytes(self.data)
        job = ROWS[self.kind][0]
        source = "jsonl" if self.suffix == ".jsonl" else "file"
        train: dict[str, Any] = {"source": source, "path": str(path)}
        if job == "grpo":
            train["environment"] = _ENVIRONMENTS.get(self.kind, {"kind": "math"})
        config: dict[str, Any] = {
            "run": {"dir": str(folder / "run")},
            "model": {"path": str(model)},
            "data": {"train": train, "format": {"chat_template": self.kind == "chat"}},
            "training": {"num_steps": 1},
            "optimizer": {"lr": 1e-3},
            "packing": {"max_tokens_per_microbatch": 256, "max_sequence_length": 128},
        }
        if self.skip_bad_rows:
            config["data"]["on_bad_row"] = "skip"
        if job == "grpo":
            config["rollout"] = {"num_prompts_per_step": 2, "num_generations_per_prompt": 2}
            config["rollout"]["max_new_tokens"] = 16
        else:
            config["training"]["batch_size"] = 2
        if job == "dpo":
            config["algorithm"] = {"kind": "dpo"}
        (folder / "rows.yaml").write_text(yaml.safe_dump(config))
        return ["data", "inspect", str(folder / "rows.yaml"), "--for", job, "-n", "2"]


def good_rows(kind: str) -> bytes:
    """A file of JSON lines with nothing wrong."""
    return _jsonl([ROWS[kind][1]] * 4, [])


def rows_file(seed: int) -> RowsFile:
    """Good rows, of which some are changed; the same seed gives the same file."""
    chance = random.Random(seed)
    kind = list(ROWS)[seed % len(ROWS)]
    good = ROWS[kind][1]
    rows = [json.loads(json.dumps(good)) for _ in range(4)]
    raw: list[str] = []
    for row in rows[: chance.randint(1, 3)]:
        _change(row, chance, raw)
    write: Callable[..., bytes]
    suffix, write = chance.choice([(".jsonl", _jsonl)] * 5 + [(".json", _json), (".csv", _csv)])
    data = write(rows, raw)
    if not raw and chance.random() < 0.15:
        suffix, data = chance.choice([_parquet, _arrow])(rows, good)
    if chance.random() < 0.3:
        data = _damage(data, chance)
    return RowsFile(kind, suffix, data, chance.random() < 0.3)


def _change(row: dict[str, Any], chance: random.Random, raw: list[str]) -> None:
    """One value, somewhere in the row; what JSON's writer would not write is left to ``raw``."""
    place: Any = row
    while True:
        key = chance.choice(list(place) if isinstance(place, dict) else range(len(place)))
        if not isinstance(place[key], dict | list) or not place[key] or chance.random() < 0.3:
            break
        place = place[key]
    match chance.randrange(6):
        case 0 if isinstance(place, dict):
            del place[key]
        case 1 if isinstance(place, dict):
            place[chance.choice(["extra", "", "\ud83d", "\x1b[31m", "x" * 1000])] = place.pop(key)
        case 2:
            place[key] = chance.choice(_OTHERS)
        case 3:
            raw.append(chance.choice(_NUMBERS))
            place[key] = f"{_MARK}{len(raw) - 1}"
        case 4 if chance.random() < 0.3:
            raw.append("[" * _DEEP + "]" * _DEEP)
            place[key] = f"{_MARK}{len(raw) - 1}"
        case _:
            place[key] = chance.choice(_TEXTS)


def _text(value: Any, raw: list[str]) -> str:
    text = json.dumps(value)
    for number, literal in enumerate(raw):
        text = text.replace(f'"{_MARK}{number}"', literal)
    return text


def _jsonl(rows: list[Any], raw: list[str]) -> bytes:
    return "".join(_text(row, raw) + "\n" for row in rows).encode()


def _json(rows: list[Any], raw: list[str]) -> bytes:
    return _text(rows, raw).encode()


def _csv(rows: list[dict[str, Any]], raw: list[str]) -> bytes:
    names = list(dict.fromkeys(name for row in rows for name in row))
    out = io.StringIO()
    writer = csv.writer(out, escapechar="\\")
    for cells in [names, *([row.get(name, "") for name in names] for row in rows)]:
        writer.writerow([str(cell) for cell in cells])
    text = out.getvalue()
    for number, literal in enumerate(raw):
        text = text.replace(f"{_MARK}{number}", literal)
    return text.encode("utf-8", "surrogatepass")


def _table(rows: list[Any], good: Any) -> Any:
    import pyarrow as pa

    try:
        return pa.Table.from_pylist(rows)
    except (pa.ArrowException, UnicodeEncodeError, TypeError):  # types that do not go together
        return pa.Table.from_pylist([good])


def _parquet(rows: list[Any], good: Any) -> tuple[str, bytes]:
    import pyarrow.parquet as pq

    out = io.BytesIO()
    pq.write_table(_table(rows, good), out)
    return ".parquet", out.getvalue()


def _arrow(rows: list[Any], good: Any) -> tuple[str, bytes]:
    import pyarrow as pa

    table, out = _table(rows, good), io.BytesIO()
    with pa.ipc.new_stream(out, table.schema) as writer:
        writer.write_table(table)
    return ".arrow", out.getvalue()


def _damage(data: bytes, chance: random.Random) -> bytes:
    """Bytes lost, changed, or put in."""
    changed = bytearray(data)
    match chance.randrange(5):
        case 0:
            return bytes(changed[: chance.randrange(len(changed) + 1)])
        case 1:
            for _ in range(chance.randint(1, 20)):
                changed[chance.randrange(len(changed))] = chance.randrange(256)
        case 2:
            place = chance.randrange(len(changed))
            changed[place:place] = chance.choice(
                [b"\0", b"\xff", b"\xed\xa0\x80", b"\n", b'"', b"\xef\xbb\xbf"]
            )
        case 3:
            return b"\xff\xfe" + data.decode("utf-8", "replace").encode("utf-16-le")
        case 4:
            return chance.randbytes(chance.randint(0, 3000))
    return bytes(changed)
