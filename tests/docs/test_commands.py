"""Commands and configurations printed in the documentation are what the command line and the schema accept.

`make guides` runs the fenced commands; here each one is parsed and its configuration resolved, in process.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import math
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

import megarl
from megarl import cli
from megarl.config.explain import explain
from megarl.config.introspect import fields_at
from megarl.config.load import load_config
from megarl.jobs import JOBS, job_with_sections, roots
from megarl.recipes import recipes
from tools.run_guides import DOCS, ROOT, blocks, fences, pages

OUTSIDE = [
    "apt-get",
    "cd",
    "cp",
    "docker",
    "echo",
    "export",
    "grep",
    "mkdir",
    "nsys",
    "pip",
    "py-spy",
    "ray",
    "rm",
    "sbatch",
]
OUTSIDE += ["sed", "source", "squeue", "tail", "tensorboard", "tmux", "vllm", "python"]
"""Programs that are not of this project, and words of the shell."""
PLACEHOLDER = re.compile(r"\b[A-Z]{2,}(_[A-Z]+)*\b|\.\.\.|[\[\]|]")


def inline_commands(text: str) -> Iterator[str]:
    """Commands in a sentence's `code`."""
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)
    for code in re.findall(r"`([^`\n]+)`", prose):
        if re.match(r"(\.venv/bin/|python (-m|tools/)|make |megarl [a-z])", code):
            yield code


def commented_commands() -> Iterator[tuple[str, str]]:
    """Commands in the comments of shipped configurations."""
    for name, path in recipes().items():
        text = " ".join(
            line.lstrip("# ") if line.startswith("#") else "\n" for line in path.read_text().splitlines()
        )
        for command in re.findall(
            r"megarl [a-z]+ --config \S+\.yaml(?: --gpus \d+)?(?: [a-z_.]+=\S+)*", text
        ):
            yield f"configs/{name}", command


def lines(block: str) -> Iterator[str]:
    """A block's commands, continued lines joined, chained ones apart."""
    for line in block.replace("\\\n", " ").splitlines():
        yield from (part for part in re.split(r" (?:&&|\|) ", line) if part.strip())


def all_commands() -> list[tuple[str, str]]:
    found = [(page, line) for page, block in blocks() for line in lines(block)]
    for page, path in pages().items():
        found += [(page, command) for command in inline_commands(path.read_text())]
    for part in (cli._EXAMPLES, *(f"  megarl {job.name} --config {job.example}" for job in JOBS.values())):
        found += [("cli", line.strip()) for line in part.splitlines() if line.startswith("  megarl")]
    return list(dict.fromkeys([*found, *commented_commands()]))


def words_of(line: str) -> list[str]:
    """Words of a command, without comment, redirections and NAME=value before it."""
    words = shlex.split(line, comments=True)
    words = words[: next((i for i, word in enumerate(words) if re.match(r"[0-9]?>", word)), len(words))]
    while words and re.match(r"[A-Z_]+=", words[0]):
        words = words[1:]
    return words


def check(line: str) -> None:
    """Raise for a command that its program would refuse."""
    words = words_of(line)
    if not words:
        return
    program, *rest = words[0].removeprefix(".venv/bin/"), *words[1:]
    for at, word in enumerate(rest):  # torchrun -m megarl, srun python -m megarl, docker run ... megarl
        if word in ("megarl", "megarl.cli") and rest[at + 1 : at + 2] and rest[at + 1] in COMMANDS:
            check_megarl(rest[at + 1 :])
            return
    if program == "megarl":
        check_megarl(rest)
    elif program == "make":
        check_make(rest)
    elif program in ("python", "torchrun", "srun") and rest[:1] == ["-m"] and rest[1] != "build":
        assert importlib.util.find_spec(rest[1]), f"no module {rest[1]}"
        if rest[1] == "benchmarks" and not PLACEHOLDER.search(rest[2]):
            assert (ROOT / "benchmarks" / f"{rest[2]}.py").is_file(), f"no benchmark {rest[2]}"
    elif program == "python" and rest[0].startswith("tools/"):
        source = (ROOT / rest[0]).read_text()
        for option in (word.partition("=")[0] for word in rest if word.startswith("--")):
            name = option.removeprefix("--")
            known = {option, name, name.replace("-", "_")}
            assert any(f'"{each}"' in source for each in known), f"{rest[0]} has no {option}"
    else:
        assert program in OUTSIDE, f"{program}: no program that the docs should use"


COMMANDS = cli.make_parsers()[1]


def check_make(words: list[str]) -> None:
    targets = set(re.findall(r"^([a-z][a-z0-9-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert {word for word in words if "=" not in word} <= targets, f"no such target: make {' '.join(words)}"


def check_megarl(words: list[str]) -> None:
    if not words or "--help" in (words[0], words[-1]):
        assert not words or words[0] in {"--help", *COMMANDS}
        return
    mention = words[:1] != ["recipes"] or len(words) == 1
    mention = mention and all(re.fullmatch(r"(--)?[a-z-]+", word) for word in words)
    if mention or any(PLACEHOLDER.search(word) for word in words if "=" not in word):
        assert words[0] in COMMANDS, f"no command megarl {words[0]}"
        text = COMMANDS[words[0]].format_help() + inner_help(words)
        for option in (word for word in words if re.fullmatch(r"--[a-z-]+", word)):
            assert option in text, f"no option {option}"
        check_keys(words[0], words)
        return
    options = cli._parse(words)
    if options.command in roots():
        root, overrides = roots()[options.command], options.overrides
        if options.command == "plan" and "run" in (
            data := yaml.safe_load((ROOT / options.config).read_text())
        ):
            root = job_with_sections(
                data
            ).root()  # a run's own file; the plan's sections may be set beside it
            overrides = [each for each in overrides if not each.startswith(("gpu.", "dtypes."))]
        load_config(root, options.config, overrides, check_files=False)
    elif options.command == "config":
        explain(options.key, options.job)
    elif options.command == "recipes" and options.recipes_command != "ls":
        assert options.name in recipes(), f"no recipe {options.name}"
    elif options.command in ("data", "env"):
        job = job_with_sections(yaml.safe_load((ROOT / options.config).read_text()))
        load_config(job.root(), options.config, options.overrides, check_files=False)


def inner_help(words: list[str]) -> str:
    """Help of a command's subcommand; of all of them if none is named."""
    inner = [action.choices for action in COMMANDS[words[0]]._actions if isinstance(action.choices, dict)]
    for choices in inner:
        named = words[1] if len(words) > 1 and re.fullmatch(r"[a-z-]+", words[1]) else None
        assert named is None or named in choices, f"no megarl {words[0]} {named}"
        return "".join(sub.format_help() for name, sub in choices.items() if named in (None, name))
    return ""


def check_keys(command: str, words: list[str]) -> None:
    """Overrides of a command with a placeholder: keys of its configuration."""
    for key in (word.partition("=")[0] for word in words if re.match(r"[a-z_]+(\.[a-z_]+)*=", word)):
        assert command not in roots() or fields_at(roots()[command], tuple(key.split("."))), f"no key {key}"


def test_every_command_is_one_that_is_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    wrong = []
    for page, line in all_commands():
        try:
            check(line)
        except (Exception, SystemExit) as error:
            wrong.append(f"{page}: {line}\n    {error!s:.300}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    "line",
    [
        "megarl grpo --config configs/quickstart_grpo.yaml optimizer.lrr=1",
        "megarl grpo --config configs/quickstart_grpo.yaml --dryrun",
        "megarl sft --config configs/gone.yaml",
        "megarl grpo --config FILE optimizer.lrr=1",
        "megarl convert hf-to-megatron DIR OUT --verfy",
        "megarl grop --config FILE",
        "megarl config optimizer.lrr",
        "megarl recipes show gone",
        "torchrun --nproc-per-node 8 -m megarl grpo --config configs/gone.yaml",
        "make gone",
        "python tools/make_tiny_model.py --gone 1",
        "python -m benchmarks gone",
        "magerl grpo",
    ],
)
def test_a_wrong_command_is_found(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    with pytest.raises((Exception, SystemExit)):
        check(line)


def yaml_keys(data: Any, at: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for name, value in data.items() if isinstance(data, dict) else ():
        yield (*at, str(name))
        yield from yaml_keys(value, (*at, str(name)))


def unknown_keys(text: str) -> list[str]:
    """Keys of a partial configuration that no command has; those below free-form keys are not looked at."""
    wrong: list[str] = []
    for path in yaml_keys(yaml.safe_load(text)):
        parents = [path[:depth] for depth in range(1, len(path))]
        if any(known_leaf(parent) for parent in parents) or ".".join(path[:-1]) in wrong:
            continue
        if not any(fields_at(root, path) for root in roots().values()):
            wrong.append(".".join(path))
    return wrong


def known_leaf(path: tuple[str, ...]) -> bool:
    """Whether it is a key of any value, e.g. the arguments of an environment."""
    fields = [field for root in roots().values() for field in fields_at(root, path)]
    return any("dict" in str(field.annotation) and "Source" not in str(field.annotation) for field in fields)


def test_every_yaml_block_has_the_schemas_keys() -> None:
    wrong = []
    for page, path in pages().items():
        for language, block in fences(path.read_text()):
            if language == "yaml":
                data = yaml.safe_load(block)
                presets = data.values() if page == "guides/grpo" else [data]  # by name; tests/config has them
                for each in presets:
                    wrong += [f"{page}: {key}" for key in unknown_keys(yaml.safe_dump(each))]
    assert wrong == []
    assert unknown_keys("algorithm: {kl_coeff: 0.1}\ndata: {train: {arguments: {free: 1}}}") == [
        "algorithm.kl_coeff"
    ]


def test_python_blocks_import_what_is_there() -> None:
    seen = 0
    for page, path in pages().items():
        for language, block in fences(path.read_text()):
            if language != "python":
                continue
            for node in ast.walk(ast.parse(block)):
                if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("megarl"):
                    module = importlib.import_module(str(node.module))
                    for alias in node.names:
                        assert hasattr(module, alias.name), f"{page}: {node.module}.{alias.name}"
                        seen += 1
                if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "megarl":
                    assert hasattr(megarl, node.attr), f"{page}: {node.attr}"
                    seen += 1
    assert seen >= 5


def test_the_page_on_testing_has_tests_that_pass_and_can_fail() -> None:
    (block,) = [
        b for language, b in fences((ROOT / "docs" / "testing.md").read_text()) if language == "python"
    ]
    found: dict[str, Any] = {}
    exec(compile(block, "docs/testing.md", "exec"), found)
    tests = [value for name, value in found.items() if name.startswith("test_")]
    assert len(tests) == 2
    for test in tests:
        test()
    found["Exact"].judge = lenient
    with pytest.raises(AssertionError, match="5 or 6"):
        found["test_wrong_and_dishonest_ones_do_not"]()


async def lenient(self: Any, prompt: Any, response_text: str) -> tuple[float, dict[str, Any]]:
    return float(prompt.metadata["answer"] in response_text), {}


def test_every_shipped_configuration_is_in_the_gallery() -> None:
    page = (ROOT / "docs" / "examples.md").read_text()
    named = {name.replace("*", ".*") for name in re.findall(r"`([a-z0-9_*/]+)`", page)}
    missing = [name for name in recipes() if not any(re.fullmatch(each, name) for each in named)]
    assert missing == []


def chance_of(k: int, n: int) -> float:
    """Exact two-sided binomial test of k heads in n throws: all outcomes that are no more likely."""
    ways = [math.comb(n, i) for i in range(n + 1)]
    return sum(each for each in ways if each <= ways[k]) / 2**n


def test_the_comparison_that_the_page_on_evaluation_prints(tmp_path: Path) -> None:
    page = (DOCS / "guides" / "eval.md").read_text()
    (block,) = [block for language, block in fences(page) if language == "python"]
    found: dict[str, Any] = {}
    exec(compile(block, "docs/guides/eval.md", "exec"), found)
    for name, right in (("a", range(40)), ("b", range(30, 52))):  # 30 problems only a solves, 12 only b
        (tmp_path / name / "samples").mkdir(parents=True)
        rows = [{"prompt_index": i, "correct": i in right} for i in range(100)]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / name / "samples" / "step_0.jsonl").write_text(text)
    better, worse, chance = found["compare"](str(tmp_path / "a"), str(tmp_path / "b"))
    assert (better, worse) == (30, 12)
    assert chance == pytest.approx(chance_of(12, 42))
    assert f"(30, 12, {chance:.3f})" in page and f"(30, 24, {chance_of(24, 54):.2f})" in page
