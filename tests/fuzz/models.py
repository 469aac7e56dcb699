"""Malformed model directories: typical broken downloads, manual and random damage."""

from __future__ import annotations

import json
import os
import pickle
import random
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

Change = Callable[[Path], Any]

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4665\nsize 3418352\n"
FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "model.safetensors",
)
ODD: tuple[Any, ...] = (
    None,
    0,
    -1,
    1,
    3,
    1.5,
    "4",
    "x",
    "",
    "\ud800",
    "\x1b[31m",
    True,
    [],
    [1, "a"],
    {},
    {"a": 1},
    float("nan"),
    float("inf"),
    10**6,
    10**12,
    10**40,
    -(10**12),
    1e308,
    ...,
)
KEYS = [
    "hidden_size",
    "num_attention_heads",
    "num_key_value_heads",
    "num_hidden_layers",
    "head_dim",
    "intermediate_size",
    "vocab_size",
    "max_position_embeddings",
    "rms_norm_eps",
    "rope_parameters",
    "rope_theta",
    "rope_scaling",
    "model_type",
    "architectures",
    "tie_word_embeddings",
    "hidden_act",
    "attention_bias",
    "sliding_window",
    "use_sliding_window",
    "eos_token_id",
    "dtype",
    "torch_dtype",
    "quantization_config",
    "layer_types",
    "initializer_range",
    "attention_dropout",
    "num_experts",
    "auto_map",
]
ROPES: tuple[Any, ...] = (
    {"rope_type": "default"},
    {"rope_type": "default", "rope_theta": "x"},
    {"rope_type": "default", "rope_theta": -1},
    {"rope_type": "linear"},
    {"rope_type": "linear", "factor": 0, "rope_theta": 1e4},
    {"rope_type": "yarn", "factor": 0, "rope_theta": 1e4, "original_max_position_embeddings": 0},
    {"rope_type": "llama3", "factor": 1, "low_freq_factor": 1, "high_freq_factor": 1, "rope_theta": 1e4,
     "original_max_position_embeddings": "x"},
    {"rope_type": ["default"]},
    {"rope_type": "default", "rope_theta": [1]},
)  # fmt: skip


def set_key(file: str, key: str, value: Any) -> Change:
    """One key of a JSON file; ... takes it out."""

    def change(folder: Path) -> None:
        path = folder / file
        content = json.loads(path.read_text())
        content.pop(key, None)
        if value is not ...:
            content[key] = value
        path.write_text(json.dumps(content))

    return change


def put(file: str, data: bytes | str) -> Change:
    """Other content."""
    return lambda folder: (folder / file).write_bytes(data.encode() if isinstance(data, str) else data)


def _cut(file: str, share: float) -> Change:
    def change(folder: Path) -> None:
        data = (folder / file).read_bytes()
        (folder / file).write_bytes(data[: int(len(data) * share)])

    return change


def _as_folder(file: str) -> Change:
    def change(folder: Path) -> None:
        (folder / file).unlink()
        (folder / file).mkdir()

    return change


def _header(change_header: Callable[[dict[str, Any]], Any]) -> Change:
    """model.safetensors with another header before the same data."""

    def change(folder: Path) -> None:
        path = folder / "model.safetensors"
        data = path.read_bytes()
        size = struct.unpack("<Q", data[:8])[0]
        header = json.loads(data[8 : 8 + size])
        changed = change_header(header)
        text = json.dumps(header if changed is None else changed).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size :])

    return change


def index(content: Any) -> Change:
    """The weights in part.safetensors, and this index; "*" stands for every tensor's name."""

    def change(folder: Path) -> None:
        from safetensors import safe_open

        (folder / "model.safetensors").rename(folder / "part.safetensors")
        with safe_open(folder / "part.safetensors", framework="pt") as file:
            names = list(file.keys())
        value = content
        if (
            isinstance(value, dict)
            and isinstance(value.get("weight_map"), dict)
            and "*" in value["weight_map"]
        ):
            value = {"weight_map": dict.fromkeys(names, value["weight_map"]["*"])}
        text = value if isinstance(value, str) else json.dumps(value)
        (folder / "model.safetensors.index.json").write_text(text)

    return change


def damages() -> dict[str, Change]:
    """By hand: what downloads, copies and editors do to a model directory."""
    first = "model.embed_tokens.weight"
    found: dict[str, Change] = {"whole": lambda folder: None}
    for file in FILES:
        found |= {
            f"{file} missing": lambda folder, file=file: (folder / file).unlink(),
            f"{file} empty": put(file, b""),
            f"{file} half": _cut(file, 0.5),
            f"{file} but for its end": _cut(file, 0.999),
            f"{file} a git-lfs pointer": put(file, POINTER),
            f"{file} a list": put(file, "[]"),
            f"{file} null": put(file, "null"),
            f"{file} a number": put(file, "5"),
            f"{file} NaN": put(file, "NaN"),
            f"{file} every byte": put(file, bytes(range(256)) * 4),
            f"{file} not UTF-8": put(file, b'{"a": "\xff"}'),
            f"{file} nested deeply": put(file, "[" * 100_000),
            f"{file} a page of HTML": put(file, "<!DOCTYPE html><html>404</html>"),
            f"{file} a long number": put(file, '{"vocab_size": 1' + "0" * 5000 + "}"),
            f"{file} a folder": _as_folder(file),
        }
    found |= {
        "header's length 2^63": lambda f: _patch(f, 0, struct.pack("<Q", 2**63)),
        "header's length 0": lambda f: _patch(f, 0, struct.pack("<Q", 0)),
        "header no JSON": lambda f: _patch(f, 8, b"x" * 20),
        "a byte more": lambda f: _append(f, b"x"),
        "no tensors": put("model.safetensors", struct.pack("<Q", 2) + b"{}"),
        "a tensor missing": _header(lambda h: h.pop(first)),
        "a tensor more": _header(lambda h: h.update(extra=h[first])),
        "offsets beyond the file": _header(lambda h: h[first].update(data_offsets=[0, 10**12])),
        "offsets that are none": _header(lambda h: h[first].update(data_offsets=["a", None])),
        "a type that is none": _header(lambda h: h[first].update(dtype="F7")),
        "another type": _header(lambda h: h[first].update(dtype="I32")),
        "a shape that is negative": _header(lambda h: h[first].update(shape=[-1, 64])),
        "another shape": _header(lambda h: h[first].update(shape=[64, 512])),
        "a header that is a list": _header(lambda h: []),
        "escape sequences in a tensor's name": _header(lambda h: h.update({"\x1b[31m": h.pop(first)})),
        "index": index({"weight_map": {"*": "part.safetensors"}}),
        "index empty": index(""),
        "index {}": index({}),
        "index []": index([]),
        "index null": index(None),
        "index cut": index('{"weight_map": {"a'),
        "index with a list": index({"weight_map": []}),
        "index to null": index({"weight_map": {"*": None}}),
        "index to a number": index({"weight_map": {"*": 5}}),
        "index to nothing": index({"weight_map": {"*": "gone.safetensors"}}),
        "index to a folder": index({"weight_map": {"*": "."}}),
        "index out of the directory": index({"weight_map": {"*": "../out.safetensors"}}),
        "index to the root": index({"weight_map": {"*": "/etc/hostname"}}),
        "index to a name with NUL": index({"weight_map": {"*": "a\0b"}}),
        "index to a long name": index({"weight_map": {"*": "a" * 5000}}),
        "index to another file": index({"weight_map": {"*": "tokenizer.json"}}),
        "index with too few": index({"weight_map": {first: "part.safetensors"}}),
        "index with one too many": index({"weight_map": {"ghost": "part.safetensors"}}),
        "a loop of links": _loop,
        "a vocabulary of nothing": _tokenizer("model", {"type": "BPE", "vocab": {}, "merges": []}),
        "a tokenizer of another kind": _tokenizer("model", {"type": "Magic"}),
        "no tokenizer model": _tokenizer("model", None),
        "added tokens 5": _tokenizer("added_tokens", 5),
        "no decoder": _tokenizer("decoder", None),
        "an endless template": put("chat_template.jinja", "{% for i in range(99999) %}{% for j in "
                                   "range(99999) %}{% endfor %}{% endfor %}"),
        "a template of 3 GB": put("chat_template.jinja", "{{ 'a' * 3000000000 }}"),
        "a template that grows": put("chat_template.jinja", "{% set n = namespace(s='ab') %}{% for i in "
                                     "range(40) %}{% set n.s = n.s ~ n.s %}{% endfor %}{{ n.s }}"),
        "a template of powers": put("chat_template.jinja", "{{ 9 ** 9 ** 9 }}"),
        "a template that is none": put("chat_template.jinja", "{% for %}"),
        "a template that raises": put("chat_template.jinja", "{{ raise_exception('no\\x1b[31m') }}"),
        "a template of the interpreter": put("chat_template.jinja", "{{ ''.__class__.__mro__ }}"),
        "a template without the text": put("chat_template.jinja", "hello"),
    }  # fmt: skip
    for key, values in {
        "eos_token": (None, 5, "<none such>", {"content": 5}, ["a"]),
        "model_max_length": ("x", -1, 0, 1e30, None),
        "tokenizer_class": ("Nobody", 5, None),
        "chat_template": (5, {"a": "b"}, "{{ broken"),
        "added_tokens_decoder": (5, {"99999": {"content": "x"}}, {"a": "b"}),
    }.items():
        for value in values:
            name = f"tokenizer_config.{key} = {value!r}"
            found[name] = set_key("tokenizer_config.json", key, value)
    for value in (None, -1, 10**6, "x", [], [4, None], True, 1.5):
        found[f"eos_token_id = {value!r}"] = set_key("generation_config.json", "eos_token_id", value)
    return found


def odd_settings() -> dict[str, Change]:
    """Every key of config.json with every odd value."""
    found = {
        f"config.{key} = {value!r}"[:80]: set_key("config.json", key, value) for key in KEYS for value in ODD
    }
    for rope in ROPES:
        found[f"config.rope_parameters = {rope!r}"] = set_key("config.json", "rope_parameters", rope)
        found[f"config.rope_scaling = {rope!r}"] = set_key("config.json", "rope_scaling", rope)
    return found


def random_damage(seed: int) -> Change:
    """Bytes of one file changed or lost."""

    def change(folder: Path) -> None:
        chance = random.Random(seed)
        path = folder / FILES[seed % len(FILES)]
        data = bytearray(path.read_bytes())
        near = len(data) if chance.random() < 0.5 else min(len(data), 1000)  # where the headers are
        for _ in range(chance.randint(1, 30)):
            data[chance.randrange(near)] = chance.randrange(256)
        path.write_bytes(data if chance.random() < 0.7 else data[: chance.randrange(len(data))])

    return change


def megatron_damages() -> dict[str, Change]:
    """Kinds of damage of a converted checkpoint's directory."""

    def at(folder: Path, name: str) -> Path:
        return next(folder.rglob(name))

    def write(name: str, data: bytes) -> Change:
        return lambda folder: at(folder, name).write_bytes(data)

    def half(name: str) -> Change:
        def change(folder: Path) -> None:
            path = at(folder, name)
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])

        return change

    found: dict[str, Change] = {"whole": lambda folder: None, "nothing": lambda folder: shutil.rmtree(folder)}
    odd = {
        "empty": b"",
        "every byte": bytes(range(256)),
        "another object": pickle.dumps({"a": 1}),
        "a list": b"[]",
        "null": b"null",
        "a pickle of code": pickle.dumps(os.getpid),
        "a pickle that never ends": b"\x80\x04" + b"(" * 100_000,
        "a pickle of a long number": b"\x80\x04\x8b" + struct.pack("<i", 2**31 - 1) + b"1",
    }
    for name in (".metadata", "metadata.json", "common.pt", "__0_0.distcp", "config.json"):
        found |= {f"{name} {what}": write(name, data) for what, data in odd.items()}
        found[f"{name} half"] = half(name)
        found[f"{name} missing"] = lambda folder, name=name: at(folder, name).unlink()
    for text in ("", "x", "-1", "1" + "0" * 5000, "../..", "\0"):
        found[f"tracker {text[:9]!r}"] = write("latest_checkpointed_iteration.txt", text.encode())
    return found


def _patch(folder: Path, place: int, data: bytes) -> None:
    with (folder / "model.safetensors").open("r+b") as file:
        file.seek(place)
        file.write(data)


def _append(folder: Path, data: bytes) -> None:
    with (folder / "model.safetensors").open("ab") as file:
        file.write(data)


def _loop(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to("model.safetensors")


def _tokenizer(key: str, value: Any) -> Change:
    return set_key("tokenizer.json", key, value)
