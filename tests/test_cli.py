"""The command line as a user sees it: real processes, exit codes, output and speed."""

from __future__ import annotations

import json
import os
import re
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

import megarl
from megarl import cli
from megarl.cli import main
from megarl.config.grpo import GrpoConfig
from megarl.config.load import load_config
from megarl.errors import UserError
from megarl.run_directory import RunDirectory
from tests.processes import apart_from_waits

ROOT = Path(megarl.__file__).resolve().parents[1]
CLEAN = {k: v for k, v in os.environ.items() if not re.match(r"(SLURM_|MASTER_|WORLD_SIZE|RANK|LOCAL_)", k)}
CONFIG = """\
run: {dir: runs/x}
model: {path: model}
optimizer: {lr: 1e-5}
data:
  train: {source: reasoning_gym, task: chain_sum, seed: 0, size: 100}
rollout: {num_prompts_per_step: 8, num_generations_per_prompt: 4, max_new_tokens: 16}
evaluation: {at_start: false, at_end: false}
training: {num_steps: 3}
"""


MODEL = {
    "model_type": "llama",
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 64,
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.yaml").write_text(CONFIG)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(MODEL))
    for name in ("tokenizer.json", "model.safetensors"):
        (tmp_path / "model" / name).write_text("{}")
    for name in os.environ.keys() - CLEAN.keys():
        monkeypatch.delenv(name)
    return tmp_path


def megarl_command(*arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "megarl.cli", *arguments],
        env={**CLEAN, "PYTHONPATH": str(ROOT), **environ},
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_version_and_help(folder: Path) -> None:
    assert megarl_command("--version").stdout == f"megarl {megarl.__version__}\n"
    text = megarl_command("--help").stdout
    for word in ("sft", "grpo", "eval", "report", "doctor", "examples:", "--dry-run"):
        assert word in text
    assert "torchrun --nproc-per-node 8 -m megarl sft --config FILE" in megarl_command("sft", "--help").stdout


def test_user_errors_have_a_line_each_and_no_traceback(folder: Path) -> None:
    done = megarl_command("grpo", "--config", "c.yaml", "optimizer.lrr=1", "model.path=none")
    assert done.returncode == 2
    assert done.stdout == ""
    assert apart_from_waits(done.stderr) == [
        "error: optimizer.lrr: unknown key; did you mean optimizer.lr? [command line]",
        f"error: model.path: no such directory (got 'none'), relative to {folder} [command line]",
    ]
    assert not (folder / "runs").exists()


def test_usage_errors(folder: Path) -> None:
    for arguments, complaint in (
        (["grpo", "--config", "c.yaml", "--dryrun"], "unrecognized arguments: --dryrun"),
        (["grop"], "there is no command 'grop'; did you mean grpo?"),
        (["xyz"], "there is no command 'xyz'; commands: sft, dpo"),
        (["train"], "there is no command 'train'; did you mean one of sft, dpo, rm, grpo, ppo, distill?"),
        (["list"], "there is no command 'list'; did you mean recipes ls?"),
    ):
        done = megarl_command(*arguments)
        assert done.returncode == 2
        assert "usage: megarl" in done.stderr and complaint in done.stderr


def test_help_and_version_as_commands(capsys: pytest.CaptureFixture[str]) -> None:
    def said(*arguments: str) -> str:
        with pytest.raises(SystemExit) as ended:
            main(list(arguments))
        assert ended.value.code == 0
        return capsys.readouterr().out

    assert said("help") == said("--help")
    assert said("help", "plan") == said("plan", "--help")
    assert said("version") == said("--version")


def test_a_job_without_any_setting(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["grpo"]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("error: megarl grpo: no configuration: ") and "megarl init grpo" in line


def test_without_a_command_there_is_the_help() -> None:
    done = megarl_command()
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == megarl_command("--help").stdout


@pytest.mark.parametrize(
    "arguments",
    [
        ["-c", "c.yaml", "optimizer.lr=2e-3", "run.seed=7"],
        ["c.yaml", "--optimizer.lr=2e-3", "--run.seed", "7"],
        ["--run.seed=7", "c.yaml", "--optimizer.lr", "2e-3"],
        ["--config=c.yaml", "run.seed=7", "optimizer.lr=2e-3"],
    ],
)
def test_settings_as_other_tools_write_them(folder: Path, arguments: list[str]) -> None:
    expected = megarl_command(
        "grpo", "--config", "c.yaml", "optimizer.lr=2e-3", "run.seed=7", "--dry-run=full"
    )
    done = megarl_command("grpo", *arguments, "--dry-run=full")
    assert (done.returncode, done.stdout) == (0, expected.stdout), done.stderr


def test_a_run_without_a_file(folder: Path) -> None:
    done = megarl_command("grpo", "optimizer.lr=1")
    assert done.returncode == 2
    assert "error: data: required but missing" in done.stderr and "[command line]" in done.stderr
    settings = [f"{key}={value}" for key, value in _flat(yaml.safe_load(Path("c.yaml").read_text()))]
    done, expected = (
        megarl_command("grpo", *arguments, "--dry-run=full") for arguments in (settings, ["-c", "c.yaml"])
    )
    assert (done.returncode, done.stdout) == (0, expected.stdout), done.stderr


def _flat(config: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", json.dumps(value) if not isinstance(value, str) else value


def test_what_files_decide_is_said_before_anything_starts(folder: Path) -> None:
    """A finished run, and one started with other values."""
    config = load_config(GrpoConfig, "c.yaml")
    directory = RunDirectory(config.run.dir)
    directory.open(config.model_dump(mode="json"))
    directory.close()
    (directory.path / "metrics.jsonl").write_text('{"step": 1, "loss": 0.5}\n')
    done = megarl_command("grpo", "-c", "c.yaml", "optimizer.lr=0.5")
    assert done.returncode == 2
    assert "was started with other values: optimizer.lr" in done.stderr
    (directory.checkpoints_path / f"step_{config.training.num_steps}").mkdir()
    (directory.path / "hf").mkdir()
    directory.summary_path.write_text("{}")
    done = megarl_command("grpo", "-c", "c.yaml")
    assert (done.returncode, apart_from_waits(done.stderr)) == (0, [])
    count = config.training.num_steps
    assert f"{config.run.dir}: complete, {count} of {count} steps." in done.stdout


def test_dry_run(folder: Path) -> None:
    done = megarl_command("grpo", "optimizer.lr=2e-3", "--config", "c.yaml", "--dry-run=full", "run.seed=7")
    assert (done.returncode, done.stderr) == (0, "")
    assert "# sequences per step: 32 (8 prompts x 4 samples)\n" in done.stdout
    assert "# longest sequence: 64 tokens\n" in done.stdout
    assert "# reference logprobs: pass skipped (algorithm.kl_coef is 0)\n" in done.stdout
    (folder / "resolved.yaml").write_text(done.stdout)
    expected = load_config(GrpoConfig, "c.yaml", ["optimizer.lr=2e-3", "run.seed=7"])
    assert load_config(GrpoConfig, "resolved.yaml") == expected
    assert not (folder / "runs").exists()


def test_overrides_on_both_sides_of_options_apply_in_order(folder: Path) -> None:
    done = megarl_command(
        "grpo", "run.seed=1", "--config", "c.yaml", "run.seed=2", "--dry-run=full", "run.seed=3"
    )
    assert "  seed: 3\n" in done.stdout


def test_only_rank_0_prints(folder: Path) -> None:
    ranks = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    for rank in ("0", "1"):
        dry = megarl_command(
            "grpo", "--config", "c.yaml", "--dry-run=full", RANK=rank, LOCAL_RANK=rank, **ranks
        )
        wrong = megarl_command("grpo", "--config", "c.yaml", "x=1", RANK=rank, LOCAL_RANK=rank, **ranks)
        assert (dry.returncode, wrong.returncode) == (0, 2)
        assert bool(dry.stdout) == bool(wrong.stderr) == (rank == "0")
        if rank == "0":
            assert "# trainer processes: 2, data_parallel_size: 2\n" in dry.stdout


def test_nothing_heavy_before_the_configuration_is_good(folder: Path) -> None:
    script = (
        "import sys; from megarl.cli import main; code = main(sys.argv[1:]); "
        "print(code, [m for m in ('torch', 'vllm', 'ray', 'transformers', 'numpy') if m in sys.modules])"
    )
    for arguments, code in ((["x=1"], 2), (["--dry-run=full"], 0)):
        command = [sys.executable, "-c", script, "grpo", "--config", "c.yaml", *arguments]
        done = subprocess.run(
            command, env={**CLEAN, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=60
        )
        assert done.stdout.splitlines()[-1] == f"{code} []"


def test_help_needs_no_schema() -> None:
    """pydantic and the classes of the settings would double its time."""
    script = (
        "import sys; from megarl.cli import make_parsers; make_parsers()[0].format_help(); "
        "print([m for m in ('pydantic', 'rich', 'yaml', 'numpy') if m in sys.modules])"
    )
    command = [sys.executable, "-c", script]
    environment = {**CLEAN, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.stdout == "[]\n", done.stderr


def test_who_only_starts_ranks_loads_nothing_heavy(folder: Path) -> None:
    """Importing torch would take seconds before the ranks start, and 200 MiB."""
    script = (
        "import sys, megarl.launch; from megarl.cli import main; megarl.launch.run_ranks = lambda *_: 7; "
        "code = main(sys.argv[1:]); "
        "print(code, [m for m in ('torch', 'vllm', 'ray', 'transformers') if m in sys.modules])"
    )
    command = [sys.executable, "-c", script, "grpo", "--config", "c.yaml", "parallel.num_processes=2"]
    environment = {**CLEAN, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines()[-1] == "7 []", done.stderr


@pytest.mark.parametrize("arguments", [["--help"], ["grpo", "--config", "c.yaml", "x=1"]])
def test_start_up_time(folder: Path, arguments: list[str]) -> None:
    times = []
    for _ in range(3):  # processor time, the least of three: other processes share the machine
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        megarl_command(*arguments)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        times.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(times) < 1.0


def test_loop_gets_the_configuration(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    got = []
    monkeypatch.setattr(cli, "_call_loop", lambda job, config: got.append((job.name, config)))
    assert cli.main(["grpo", "--config", "c.yaml", "run.seed=5"]) == 0
    assert got == [("grpo", load_config(GrpoConfig, "c.yaml", ["run.seed=5"]))]


def test_exit_codes_of_the_loop(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def loop(error: BaseException) -> None:
        def run(_job: object, _config: object) -> None:
            raise error

        monkeypatch.setattr(cli, "_call_loop", run)

    command = ["grpo", "--config", "c.yaml"]
    loop(UserError("model.layers.0.x: no such tensor"))
    assert cli.main(command) == 2
    monkeypatch.setenv("RANK", "1")
    assert cli.main(command) == 2
    lines = "error: model.layers.0.x: no such tensor\nerror (rank 1): model.layers.0.x: no such tensor\n"
    assert capfd.readouterr().err == lines
    loop(KeyboardInterrupt())
    assert cli.main(command) == 130
    loop(SystemExit(143))
    with pytest.raises(SystemExit) as caught:
        cli.main(command)
    assert caught.value.code == 143
    loop(ZeroDivisionError())
    with pytest.raises(ZeroDivisionError):
        cli.main(command)


def test_several_processes_are_started_here_only_without_a_launcher(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started, called = [], []
    monkeypatch.setattr("megarl.launch.run_ranks", lambda *arguments: started.append(arguments) or 7)
    monkeypatch.setattr(cli, "_call_loop", lambda _, config: called.append(config))
    arguments = ["grpo", "--config", "c.yaml", "parallel.num_processes=2"]
    assert cli.main(arguments) == 7
    assert started == [(2, arguments, Path("runs/x/ranks"))]
    assert not called
    for name, value in {
        "WORLD_SIZE": "4",
        "RANK": "1",
        "LOCAL_RANK": "1",
        "MASTER_ADDR": "h",
        "MASTER_PORT": "1",
    }.items():
        monkeypatch.setenv(name, value)
    assert cli.main(arguments) == 0
    assert len(started) == 1
    assert called[0].parallel.num_processes == 4


def test_report_of_something_else(folder: Path) -> None:
    done = megarl_command("report", "model")
    assert (done.returncode, done.stderr) == (
        2,
        "error: model: not a run directory (no metrics.jsonl in it)\n",
    )


RING = [
    *("parallel.context_attention=ring", "parallel.context_parallel_size=2", "parallel.num_processes=2"),
    "packing.share_prefix=off",
]


@pytest.mark.parametrize("name", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_memory_that_no_engine_can_map_is_refused_before_ranks_start(
    folder: Path, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("megarl.platform.chosen_name", lambda: "cuda")
    started = []
    monkeypatch.setattr("megarl.launch.run_ranks", lambda *_: (started.append(1), 0)[1])
    command = ["grpo", "--config", "c.yaml", "parallel.num_processes=2"]
    monkeypatch.setenv(name, "max_split_size_mb:64,expandable_segments:True")
    assert cli.main(command) == 2
    [line] = apart_from_waits(capsys.readouterr().err)
    assert line.startswith(f"error: {name}: expandable_segments: no engine can map such memory")
    assert not started
    assert cli.main([*command, "--dry-run=full"]) == 0
    assert cli.main([*command, "weights.transport=peer"]) == 0
    monkeypatch.setattr("megarl.platform.chosen_name", lambda: "cpu")
    assert cli.main(command) == 0
    assert len(started) == 2


@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("cpu", "uses Transformer Engine and needs a GPU; all_gather works on any device"),
        ("cuda", "needs the package transformer-engine; all_gather works without"),
    ],
)
def test_an_option_of_transformer_engine_is_refused_before_ranks_start(
    folder: Path,
    device: str,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Not by a dry run: that may be made on another machine than the run."""
    monkeypatch.setattr("megarl.platform.packages.chosen_name", lambda: device)
    monkeypatch.setattr("megarl.platform.packages.find_spec", lambda name: None)
    monkeypatch.setattr("megarl.launch.run_ranks", lambda *_: pytest.fail("ranks were started"))
    assert cli.main(["grpo", "--config", "c.yaml", *RING]) == 2
    [line] = apart_from_waits(capsys.readouterr().err)
    assert line == f"error: parallel.context_attention: ring {message}"
    assert cli.main(["grpo", "--config", "c.yaml", "--dry-run=full", *RING]) == 0
