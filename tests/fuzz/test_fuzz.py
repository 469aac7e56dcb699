"""Malformed input: a command runs, or reports in one line what to fix; never a traceback, never a hang.

The default tests take a sample of each kind, `slow` ones thousands. The seed in a failing name reproduces the
input: ``rows_file(seed)``, ``changed(text, seed)``, ``random_damage(seed)``.
"""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from megarl.jobs import JOBS
from tests.end_to_end.harness import make_model
from tests.fuzz import configurations, models, rows
from tests.fuzz.outcome import Outcome, faults, run

pytestmark = pytest.mark.timeout(1800)  # each command has ten seconds of its own

SEED = 20261128


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("fuzz_model") / "model")


@pytest.fixture(scope="module", autouse=True)
def loaded(tmp_path_factory: pytest.TempPathFactory, model: Path) -> None:
    """The libraries: their import takes seconds, which are no command's."""
    folder = tmp_path_factory.mktemp("loaded")
    run(
        "load", rows.RowsFile("chat", ".jsonl", rows.good_rows("chat"), False).write(folder, model), limit=120
    )
    run("load", ["convert", "inspect", str(model)], limit=120)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path) -> Iterator[None]:
    """Odd paths may be relative ones."""
    before = Path.cwd()
    (tmp_path / "cwd").mkdir()
    os.chdir(tmp_path / "cwd")
    yield
    os.chdir(before)


@pytest.fixture
def configs(tmp_path: Path, model: Path) -> dict[str, Path]:
    """A good configuration of every job."""
    for job in JOBS:
        (tmp_path / f"{job}.yaml").write_text(configurations.base(job, model, tmp_path))
    return {job: tmp_path / f"{job}.yaml" for job in JOBS}


def check(outcomes: list[Outcome], least: int) -> None:
    assert len(outcomes) >= least
    assert not (found := faults(outcomes)), found
    codes = {each.code for each in outcomes}
    assert codes == {0, 2}, "input of both kinds: what is refused and what is not"


def dry_run(name: str, job: str, config: Path, *overrides: str) -> Outcome:
    return run(name, [job, "--config", str(config), "--dry-run=full", *overrides])


def test_every_job_has_a_good_configuration(configs: dict[str, Path]) -> None:
    outcomes = [dry_run(job, job, config) for job, config in configs.items()]
    assert [each.code for each in outcomes] == [0] * len(outcomes), [each.errors for each in outcomes]


@pytest.mark.parametrize("share", [0.05, pytest.param(0.2, marks=pytest.mark.slow)])
def test_every_setting_with_odd_values(configs: dict[str, Path], share: float) -> None:
    every = configurations.settings()
    some = random.Random(SEED).sample(every, int(share * len(every)))
    outcomes = [
        dry_run(f"{job} {key}={text[:50]}", job, configs[job], f"{key}={text}") for job, key, text in some
    ]
    check(outcomes, least=500)


def test_malformed_files(tmp_path: Path, configs: dict[str, Path]) -> None:
    outcomes = []
    for name, text in configurations.files(configs["sft"].read_text()).items():
        path = tmp_path / "odd.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))
        outcomes.append(dry_run(name, "sft", path))
    check(outcomes, least=30)


@pytest.mark.parametrize("count", [300, pytest.param(3000, marks=pytest.mark.slow)])
def test_files_changed_at_random(tmp_path: Path, configs: dict[str, Path], count: int) -> None:
    outcomes = []
    for seed in range(count):
        job = list(JOBS)[seed % len(JOBS)]
        path = tmp_path / "changed.yaml"
        path.write_bytes(configurations.changed(configs[job].read_text(), seed))
        outcomes.append(dry_run(f"{job}, seed {seed}", job, path))
    check(outcomes, least=count)


@pytest.mark.slow
def test_odd_command_lines(tmp_path: Path, model: Path, configs: dict[str, Path]) -> None:
    commands = configurations.commands(str(configs["sft"]), model, tmp_path)
    check([run(name, arguments) for name, arguments in commands], least=80)


@pytest.mark.parametrize("count", [100, pytest.param(1000, marks=pytest.mark.slow)])
def test_rows(tmp_path: Path, model: Path, count: int) -> None:
    outcomes = []
    for seed in range(count):
        file = rows.rows_file(seed)
        outcomes.append(run(f"seed {seed}, {file.kind}{file.suffix}", file.write(tmp_path, model)))
    check(outcomes, least=count)


@pytest.mark.parametrize("count", [20, pytest.param(250, marks=pytest.mark.slow)])
def test_model_directories(tmp_path: Path, model: Path, count: int) -> None:
    """Dry run, inspection of data and conversion of each."""
    chance = random.Random(SEED)
    by_hand, odd = models.damages(), models.odd_settings()
    changes = dict(
        chance.sample(sorted(by_hand.items(), key=lambda item: item[0]), min(2 * count, len(by_hand)))
    )
    changes |= {name: odd[name] for name in chance.sample(sorted(odd), count)}
    changes |= {f"seed {seed}": models.random_damage(seed) for seed in range(count)}
    changes["whole"] = by_hand["whole"]
    outcomes = []
    for name, change in changes.items():
        directory, out = tmp_path / "model", tmp_path / "out"
        for left in (directory, out, tmp_path / "out.partial"):
            shutil.rmtree(left, ignore_errors=True)
        shutil.copytree(model, directory)
        change(directory)
        command = rows.RowsFile("chat", ".jsonl", rows.good_rows("chat"), False).write(tmp_path, directory)
        outcomes.append(run(f"dry run: {name}", ["sft", "--config", command[2], "--dry-run=full"]))
        outcomes.append(run(f"data: {name}", command))
        outcomes.append(run(f"convert: {name}", ["convert", "hf-to-megatron", str(directory), str(out)]))
    check(outcomes, least=9 * count)


def test_megatron_checkpoints(tmp_path: Path, model: Path) -> None:
    good, odd, out = tmp_path / "good", tmp_path / "odd", tmp_path / "out"
    assert run("control", ["convert", "hf-to-megatron", str(model), str(good)]).code == 0
    outcomes = []
    for name, change in models.megatron_damages().items():
        for left in (odd, out, tmp_path / "out.partial"):
            shutil.rmtree(left, ignore_errors=True)
        shutil.copytree(good, odd)
        change(odd)
        outcomes.append(run(f"inspect: {name}", ["convert", "inspect", str(odd)]))
        outcomes.append(run(f"back: {name}", ["convert", "megatron-to-hf", str(odd), str(out)]))
    check(outcomes, least=100)
