"""Malformed configurations: whole files, every setting with odd values, random changes, commands."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from pathlib import Path

from megarl.config.introspect import sections_of, walk
from megarl.jobs import JOBS

ROOT = Path(__file__).resolve().parents[2]

ODD_VALUES = (
    ".nan",
    ".inf",
    "-.inf",
    "-1",
    "0",
    "2.5",
    "1e308",
    "1e-320",
    "1" + "0" * 40,
    "1" + "0" * 5000,
    "true",
    "null",
    '""',
    "abc",
    "[]",
    "[1, {a: 2}]",
    "{}",
    "{a: 1}",
    "[[[]]]",
    "~/x",
    "$HOME/x",
    "${NOT_SET_ANYWHERE}",
    '"\\ud800"',
    '"\\0"',
    '"\\e[31mred\\e[0m"',
    '"a\\nb"',
    "x" * 5000,
    "../" * 400 + "x",
    "!!int abc",
    "!!float x",
    "!!bool maybe",
    "!!python/object/apply:os.getpid []",
    "!!binary aGk=",
    "&a [*a]",
    "١٢",
)


def base(job: str, model: Path, folder: Path) -> str:
    """A quickstart's configuration on a model of the test's."""
    text = (ROOT / "configs" / f"quickstart_{job}.yaml").read_text()
    text = re.sub(r"runs/quickstart/(?:(?:\w+/)?hf|model)\b", str(model), text)
    return text.replace("runs/quickstart", str(folder / "runs"))


def settings() -> list[tuple[str, str, str]]:
    """Every key of every job with every odd value: (job, key, value), each key once."""
    seen: dict[tuple[str, ...], str] = {}
    for job in JOBS.values():
        for path, field in walk(job.root()).items():
            if not sections_of(field.annotation) or len(path) > 1:
                seen.setdefault(path, job.name)
    return [(job, ".".join(path), value) for path, job in seen.items() for value in ODD_VALUES]


def files(base_text: str) -> dict[str, str | bytes]:
    """Whole files with one thing wrong (or right), by name."""
    lines = base_text.splitlines()
    laughs = "a: &a [x, x, x, x, x, x, x, x, x, x]\n"
    for before, name in zip("abcdefgh", "bcdefghi", strict=True):
        laughs += f"{name}: &{name} [" + ", ".join([f"*{before}"] * 10) + "]\n"
    wide = "a: &a {" + ", ".join(f"k{i}: 1" for i in range(3000)) + "}\n"
    wide += "b: [" + ", ".join(["*a"] * 3000) + "]\n"
    merges = "a: &a {k: 1}\n" + "".join(
        f"{chr(98 + i)}: &{chr(98 + i)} {{" + ", ".join(f"k{j}: *{chr(97 + i)}" for j in range(10)) + "}\n"
        for i in range(9)
    )
    return {
        "nothing": "",
        "comments alone": "# none\n",
        "a list": "- 1\n- 2\n",
        "a word": "word",
        "null": "null",
        "aliases of aliases": laughs,
        "aliases of mappings": merges,
        "a large mapping many times": wide,
        "lists 5,000 deep": "x: " + "[" * 5000 + "]" * 5000,
        "mappings 3,000 deep": "x: " + "{a: " * 3000 + "1" + "}" * 3000,
        "blocks 1,500 deep": "".join(" " * depth + f"k{depth}:\n" for depth in range(1500)),
        "brackets that never close": "x: " + "[" * 100_000,
        "tab": "run:\n\tdir: x\n",
        "open quote": base_text + "\nx: 'abc\n",
        "two documents": base_text + "\n---\n" + base_text,
        "unknown alias": base_text + "\nx: *nobody\n",
        "NUL": base_text + "\nx: \0\n",
        "bell": base_text + "\nx: \x07\n",
        "escape sequence in a key": base_text + '\n"\\e]0;title\\a": 1\n',
        "line break in a key": base_text + '\n"a\\nb": 1\n',
        "surrogate in a key": base_text + '\n"\\ud800": 1\n',
        "a key of a megabyte": "k" * 1_000_000 + ": 1\n",
        "a value of ten megabytes": "x: '" + "a" * 10_000_000 + "'\n",
        "a comment of ten megabytes": base_text + "\n# " + "a" * 10_000_000 + "\n",
        "odd keys": base_text + "\n? [a, b]\n: 1\n? {c: d}\n: 1\n5: 1\n~: 1\ntrue: 1\n.nan: 1\n'': 1\n",
        "latin-1": base_text.encode() + b"\n# \xe9\n",
        "UTF-16": base_text.encode("utf-16"),
        "UTF-32": base_text.encode("utf-32"),
        "BOM": b"\xef\xbb\xbf" + base_text.encode(),
        "CRLF": base_text.replace("\n", "\r\n"),
        "CR": base_text.replace("\n", "\r"),
        "every byte": bytes(range(256)) * 16,
        "sections twice": base_text + base_text,
        "sections reversed": "\n".join(reversed(lines)),
        "a million short lines": base_text + "\n#" * 1_000_000,
        "a list of 300,000": base_text + "\nx: [" + "1, " * 300_000 + "1]\n",
    }


def changed(base_text: str, seed: int) -> bytes:
    """A file with a few changes at random: bytes, characters of YAML's syntax, lines, indentation, values."""
    chance = random.Random(seed)
    lines = base_text.splitlines()
    for _ in range(chance.randint(1, 4)):
        at = chance.randrange(len(lines))
        match chance.randrange(7):
            case 0:
                del lines[at]
                lines = lines or [""]
            case 1:
                lines.insert(at, chance.choice(lines))
            case 2:
                lines[at] = " " * chance.randint(0, 9) + lines[at].strip()
            case 3:
                place = chance.randint(0, len(lines[at]))
                odd = chance.choice("{}[]:,&*#?|-<>=!%@`'\"\\~$\t\0\x1b\u2028\ufeff\ud800")
                lines[at] = lines[at][:place] + odd + lines[at][place:]
            case 4:
                key = lines[at].partition(":")[0]
                lines[at] = f"{key}: {chance.choice(ODD_VALUES)}"
            case 5:
                lines[at] = lines[at].replace(":", "", 1)
            case 6:
                lines[at], other = lines[at - 1], lines[at]
                lines[at - 1] = other
    text = bytearray("\n".join(lines).encode("utf-8", "surrogatepass"))
    if chance.random() < 0.25:
        for _ in range(chance.randint(1, 5)):
            text[chance.randrange(len(text))] = chance.randrange(256)
    return bytes(text)


def commands(config: str, model: Path, folder: Path) -> Iterator[tuple[str, list[str]]]:
    """Command lines with one thing wrong: (name, arguments)."""
    dry = ["sft", "--config", config, "--dry-run=full"]
    overrides = {
        "no equals sign": "optimizer",
        "no key": "=5",
        "dots alone": "..=5",
        "unknown": "optimizer.learning_rate=1",
        "a whole section": "optimizer=5",
        "into a value": "optimizer.lr.x=5",
        "open bracket": "optimizer.lr=[1",
        "key twice": "optimizer={lr: 1, lr: 2}",
        "deep": "data.train.arguments=" + "[" * 5000,
        "aliases": "data.train.arguments=&a [*a, *a]",
        "surrogate": "run.dir=/tmp/\udcff",
        "surrogate in a key": "run.\udcff=1",
        "escape sequence": "run.dir=\x1b[31m",
        "escape sequence in a key": "run.\x1b[31m=1",
        "two lines": "optimizer.lr=1\noptimizer.lr: 2",
        "a megabyte": "run.dir=" + "a" * 1_000_000,
        "a name of 300": f"run.dir={folder}/" + "a" * 300,
        "NUL": "run.dir=a\0b",
        "NUL in the model's path": "model.path=a\0b",
        "NUL in the data's path": 'data.train={source: jsonl, path: "a\\0b"}',
        "a long path of data": "data.train={source: jsonl, path: " + "a" * 5000 + "}",
        "below a file": f"run.dir={config}/x",
        "in /proc": "run.dir=/proc/x",
        "list index": "data.train.response_templates.0=x",
        "templates that are none": "data.train.response_templates=[1, {a: 2}]",
    }
    for name, text in overrides.items():
        yield f"override: {name}", [*dry, text]
    odd = ["", "a" * 5000, "\udcff", str(folder), "/dev/null", "/nope", "/proc/self/mem", config]
    for path in odd:
        shown = repr(path[:40])
        yield f"config {shown}", ["sft", "--config", path, "--dry-run=full"]
        yield f"report of {shown}", ["report", path]
        yield f"convert inspect {shown}", ["convert", "inspect", path]
        yield f"convert from {shown}", ["convert", "hf-to-megatron", path, str(folder / "out")]
        yield f"convert back from {shown}", ["convert", "megatron-to-hf", path, str(folder / "out")]
        yield f"convert to {shown}", ["convert", "hf-to-megatron", str(model), path]
        yield f"data of {shown}", ["data", "inspect", path]
    for count in ("0", "-3", "many", "1" + "0" * 12, "1" + "0" * 30):
        yield f"plan for {count}", ["plan", "--config", config, "--gpus", count]
        yield f"inspect {count}", ["data", "inspect", config, "-n", count]
    for size in ("0", "x", "1" + "0" * 30, ""):
        command = ["convert", "hf-to-megatron", str(model), str(folder / "out2"), "--max-shard-size", size]
        yield f"shards of {size!r}", command
    for words in ([], ["trian"], ["sft"], ["sft", "--confg", config], ["convert"], ["data"], ["\x1b[31m"]):
        yield f"command {words!r}", words
