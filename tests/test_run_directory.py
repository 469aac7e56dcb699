"""The run directory: resume, atomicity, lock, and the check that a configuration continues a run."""

from __future__ import annotations

import copy
import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from megarl.config.yaml_text import parse_yaml
from megarl.errors import UserError
from megarl.run_directory import RunDirectory, read_metrics, write_atomically

CONFIG: dict[str, Any] = {
    "run": {"dir": "runs/x", "seed": 1},
    "optimizer": {"lr": 1e-5, "lr_schedule": "constant"},
    "checkpoint": {"interval": 50, "keep": 2},
    "logging": {"tensorboard": False, "wandb": None},
    "data": {"train": {"task": "chain_sum", "arguments": {"min_terms": 2}}},
    "training": {"num_steps": 10},
}


def changed(**fields: Any) -> dict[str, Any]:
    """CONFIG with ``section__field=value`` replaced."""
    config = copy.deepcopy(CONFIG)
    for name, value in fields.items():
        section, field = name.split("__")
        config[section][field] = value
    return config


def run_python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *arguments], capture_output=True, text=True, timeout=60
    )


def train(path: Path, steps: range, after: int | None = None) -> None:
    """Log the steps and save a checkpoint at the last."""
    with RunDirectory(path) as run:
        run.open(CONFIG)
        run.start_after(after)
        for step in steps:
            run.append_metrics(step, {"loss": 1 / (step + 1)})
            run.write_samples(step, [{"step": step, "prompt": f"p{step}"}])
            if step % 2 == 0:
                run.write_evaluation(step, [{"step": step}])
        (run.begin_checkpoint(steps[-1]) / "weights").write_text(f"weights of {steps[-1]}")
        run.commit_checkpoint(steps[-1])


def test_creating_the_object_touches_nothing(tmp_path: Path) -> None:
    assert RunDirectory(tmp_path / "run").latest_checkpoint() is None
    assert not (tmp_path / "run").exists()


def test_metrics_survive_as_strict_json(tmp_path: Path) -> None:
    with RunDirectory(tmp_path) as run:
        run.open(CONFIG)
        run.start_after(None)
        run.append_metrics(1, {"loss": 0.1, "kl_ref": float("nan"), "ratio_max": float("inf")})
    text = (tmp_path / "metrics.jsonl").read_text()

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    line = json.loads(text, parse_constant=refuse)
    assert line["step"] == 1
    assert line["loss"] == 0.1
    assert repr(float(line["kl_ref"])) == "nan"
    assert float(line["ratio_max"]) == float("inf")


def test_resume_forgets_later_steps_and_a_half_written_line(tmp_path: Path) -> None:
    train(tmp_path, range(1, 7))
    untouched = (tmp_path / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    with open(tmp_path / "metrics.jsonl", "a") as handle:
        handle.write('{"step": 7, "lo')
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 3, 4, 5, 6]
    with RunDirectory(tmp_path) as run:
        run.open(CONFIG)
        run.start_after(4)
        assert (tmp_path / "metrics.jsonl").read_bytes() == b"".join(untouched[:4])
        assert sorted(path.name for path in run.samples_path.iterdir()) == [
            f"step_{n}.jsonl" for n in (1, 2, 3, 4)
        ]
        assert sorted(path.name for path in run.evaluations_path.iterdir()) == [
            "step_2.jsonl",
            "step_4.jsonl",
        ]
        run.append_metrics(5, {"loss": 9.0})
    assert [(line["step"], line["loss"]) for line in read_metrics(tmp_path)][3:] == [(4, 0.2), (5, 9.0)]


def test_a_complete_last_line_without_newline_is_kept_and_closed(tmp_path: Path) -> None:
    train(tmp_path, range(1, 3))
    text = (tmp_path / "metrics.jsonl").read_text()
    (tmp_path / "metrics.jsonl").write_text(text.rstrip("\n"))
    train(tmp_path, range(3, 4), after=2)
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 3]


def test_start_from_the_beginning_forgets_the_evaluation_at_step_0_too(tmp_path: Path) -> None:
    with RunDirectory(tmp_path) as run:
        run.open(CONFIG)
        run.start_after(None)
        run.append_metrics(0, {"accuracy": 0.5})
    with RunDirectory(tmp_path) as run:
        run.open(CONFIG)
        run.start_after(None)
    assert read_metrics(tmp_path) == []


def test_a_broken_line_in_the_middle_is_named(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": \n{"step": 3}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl, line 2"):
        read_metrics(tmp_path)


def test_logging_before_start_after_is_refused(tmp_path: Path) -> None:
    with RunDirectory(tmp_path) as run:
        run.open(CONFIG)
        with pytest.raises(AssertionError, match="start_after"):
            run.append_metrics(1, {})


def test_an_interrupted_save_is_never_picked_up(tmp_path: Path) -> None:
    train(tmp_path, range(1, 3))
    code = """
        import os, signal, sys
        from megarl.run_directory import RunDirectory
        run = RunDirectory(sys.argv[1])
        run.open(__import__("yaml").safe_load(open(run.config_path)))
        (run.begin_checkpoint(5) / "weights").write_text("half")
        os.kill(os.getpid(), signal.SIGKILL)
    """
    assert run_python(code, str(tmp_path)).returncode == -signal.SIGKILL
    run = RunDirectory(tmp_path)
    assert run.partial_checkpoint_path(5).exists()
    assert run.latest_checkpoint() == tmp_path / "checkpoints" / "step_2"
    with run:
        run.open(CONFIG)
        assert not run.partial_checkpoint_path(5).exists()
        (run.begin_checkpoint(5) / "weights").write_text("whole")
        assert run.commit_checkpoint(5) == run.latest_checkpoint()
    assert (tmp_path / "checkpoints" / "step_5" / "weights").read_text() == "whole"


@pytest.mark.parametrize("fatal_call", ["os.replace", "os.fsync"])
def test_kill_within_truncation_keeps_every_line(tmp_path: Path, fatal_call: str) -> None:
    train(tmp_path, range(1, 7))
    before = (tmp_path / "metrics.jsonl").read_bytes()
    code = f"""
        import os, signal, sys, yaml
        from megarl.run_directory import RunDirectory
        run = RunDirectory(sys.argv[1])
        run.open(yaml.safe_load(open(run.config_path)))
        {fatal_call} = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        run.start_after(3)
    """
    assert run_python(code, str(tmp_path)).returncode == -signal.SIGKILL
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
    assert list(tmp_path.glob(".*.tmp"))
    with RunDirectory(tmp_path) as run:
        run.open(CONFIG)
        assert not list(tmp_path.glob(".*.tmp"))


def test_kill_within_prune_leaves_no_half_checkpoint(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        train(tmp_path, range(step, step + 1), after=step - 1)
    code = """
        import os, shutil, signal, sys
        from megarl.run_directory import RunDirectory
        shutil.rmtree = lambda path: os.kill(os.getpid(), signal.SIGKILL)
        RunDirectory(sys.argv[1]).prune(keep=1)
    """
    assert run_python(code, str(tmp_path)).returncode == -signal.SIGKILL
    run = RunDirectory(tmp_path)
    assert run.checkpoint_steps() == [2, 3]
    with run:
        run.open(CONFIG)
        assert run.prune(keep=1) == [2]
    assert sorted(path.name for path in run.checkpoints_path.iterdir()) == ["step_3"]


def test_latest_checkpoint_is_by_number_not_by_name(tmp_path: Path) -> None:
    for name in ("step_9", "step_10", ".step_11.partial", "step_12.bak", "notes"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    run = RunDirectory(tmp_path)
    assert run.checkpoint_steps() == [9, 10]
    assert run.latest_checkpoint() == tmp_path / "checkpoints" / "step_10"


def test_two_processes_cannot_run_in_one_directory(tmp_path: Path) -> None:
    code = """
        import sys
        from megarl.errors import UserError
        from megarl.run_directory import RunDirectory
        try:
            RunDirectory(sys.argv[1]).open({"run": {}})
        except UserError as error:
            print(error)
    """
    with RunDirectory(tmp_path) as run:
        run.open(CONFIG)
        message = run_python(code, str(tmp_path)).stdout
        assert str(tmp_path) in message
        assert f"process {os.getpid()} " in message
        assert message.count("\n") == 1
    assert run_python(code, str(tmp_path)).stdout == ""


def test_the_lock_dies_with_its_process_even_if_a_child_lives_on(tmp_path: Path) -> None:
    code = """
        import os, signal, sys, time
        from megarl.run_directory import RunDirectory
        run = RunDirectory(sys.argv[1])
        run.open({})
        if os.fork() == 0:
            os.close(1), os.close(2)
            time.sleep(20)
            os._exit(0)
        os.kill(os.getpid(), signal.SIGKILL)
    """
    assert run_python(code, str(tmp_path)).returncode == -signal.SIGKILL
    with RunDirectory(tmp_path) as run:
        run.open({})


def test_fields_that_change_the_training_are_refused_by_name(tmp_path: Path) -> None:
    train(tmp_path, range(1, 2))
    config = changed(optimizer__lr=2e-5, training__num_steps=99)
    config["data"]["train"]["arguments"] = {"min_terms": 3}
    with pytest.raises(UserError) as caught:
        RunDirectory(tmp_path).open(config)
    message = str(caught.value)
    assert "optimizer.lr (was 1e-05, now 2e-05)" in message
    assert "data.train.arguments.min_terms (was 2, now 3)" in message
    assert "num_steps" not in message
    assert "new run.dir" in message
    with RunDirectory(tmp_path) as run:  # the refused start changed nothing and left no lock
        assert run.open(CONFIG) == []


def test_free_fields_may_change_and_are_reported(tmp_path: Path) -> None:
    train(tmp_path, range(1, 2))
    config = changed(
        training__num_steps=99, checkpoint__keep=5, logging__wandb={"project": "p"}, run__dir="elsewhere/x"
    )
    with RunDirectory(tmp_path) as run:
        assert "training.num_steps (was 10, now 99)" in run.open(config)
    with RunDirectory(tmp_path) as run:
        assert run.open(config) == []


def test_a_run_that_has_not_begun_takes_new_values(tmp_path: Path) -> None:
    with RunDirectory(tmp_path) as run:
        run.open(CONFIG)
    with RunDirectory(tmp_path) as run:
        assert run.open(changed(optimizer__lr=3e-5)) == ["optimizer.lr (was 1e-05, now 3e-05)"]


def test_a_field_that_came_later_is_no_change_at_its_default(tmp_path: Path) -> None:
    train(tmp_path / "run", range(1, 4))
    newer = changed(optimizer__momentum=0.0) | {"lora": None}
    with RunDirectory(tmp_path / "run") as run:
        assert run.open(newer, CONFIG) == []
    train(tmp_path / "other", range(1, 4))
    chosen = changed(optimizer__momentum=0.5)
    with RunDirectory(tmp_path / "other") as run, pytest.raises(UserError) as error:
        run.open(chosen | {"lora": None}, chosen)
    assert "optimizer.momentum (was unset, now 0.5)" in str(error.value)
    assert "lora" not in str(error.value)


def test_a_directory_that_is_no_run_is_refused(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    with pytest.raises(UserError, match=r"no config\.yaml"):
        RunDirectory(tmp_path).open(CONFIG)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"run\.dir: cannot write"):
        RunDirectory(tmp_path / "file").open(CONFIG)


def test_write_atomically_never_shows_a_partial_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "summary.json"
    write_atomically(path, "old")
    seen = []
    replace = os.replace

    def spy(source: Path, target: Path) -> None:
        seen.append((Path(source).read_text(), path.read_text()))
        replace(source, target)

    monkeypatch.setattr(os, "replace", spy)
    write_atomically(path, "new")
    assert seen == [("new", "old")]
    assert path.read_text() == "new"
    assert [file.name for file in tmp_path.iterdir()] == ["summary.json"]


def test_config_yaml_is_read_back_by_the_configuration_loader(tmp_path: Path) -> None:
    config = changed(run__dir="1e-5", data__train={"task": "a ${HOME} #: 'x'", "arguments": {}})
    with RunDirectory(tmp_path) as run:
        run.open(config)
    assert parse_yaml((tmp_path / "config.yaml").read_text(), "config.yaml").value == config


@pytest.mark.parametrize(
    "name",
    [
        *("samples", "checkpoints", "ranks", "evaluations"),
        *("config.yaml", "metrics.jsonl", "summary.json", "report.html", "console.log", "inputs.json"),
    ],
)
def test_what_is_of_another_kind_is_one_line_before_anything_is_written(tmp_path: Path, name: str) -> None:
    path, is_file = tmp_path / name, "." not in name
    path.write_text("x") if is_file else path.mkdir()
    with pytest.raises(
        UserError, match=rf"^run\.dir: .*{name} is a (file|directory) where the run keeps a"
    ) as told:
        RunDirectory(tmp_path).open({"a": 1})
    assert "\n" not in str(told.value)
    assert {each.name for each in tmp_path.iterdir()} == {name, ".lock"}
