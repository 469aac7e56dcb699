"""tools/gpu_check.py: limits, verdicts, and the results of an interrupted run."""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import time
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
TELL = "from gpu_checks.report import Report; from pathlib import Path; r = Report(Path()); "


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    return importlib.import_module


@pytest.fixture
def tool(module: Callable[[str], Any]) -> Any:
    return module("gpu_check")


def run(tool: Any, folder: Path, seconds: float = 60.0, **programs: Any) -> dict[str, Any]:
    """Run Python ``programs`` (text, or text and limit) as steps; their outcomes as they lie on disk."""
    steps = []
    for name, program in programs.items():
        text, limit = program if isinstance(program, tuple) else (program, 20.0)
        steps.append(tool.Step(name, limit, needs=False, command=(sys.executable, "-c", text)))
    results = tool.Results(folder, steps)
    tool.run_steps(steps, results, seconds, [], tool.environment(folder))
    return json.loads((folder / "results.json").read_text())["steps"]


def test_every_step_has_its_verdict_and_none_stops_the_next(tool: Any, tmp_path: Path) -> None:
    found = run(
        tool,
        tmp_path,
        good=TELL + f"print({'@gpu_check {'!r}); r.figure('speed_tb_per_s', 3.0); r.summary('fast')",
        wrong=TELL + "r.check(1 == 2, 'one is not two'); r.figure('after', 1)",
        raises="raise ValueError('no such thing')",
        crashes="import os; os.kill(os.getpid(), 11)",
        elsewhere="print('nothing for it here'); raise SystemExit(3)",
        last=TELL + "r.figure('reached', True)",
    )
    verdicts = {name: outcome["verdict"] for name, outcome in found.items()}
    assert verdicts == {
        "good": "passed",
        "wrong": "failed",
        "raises": "failed",
        "crashes": "failed",
        "elsewhere": "skipped",
        "last": "passed",
    }
    assert found["good"]["figures"] == {"speed_tb_per_s": 3.0}
    assert found["wrong"]["problems"] == ["one is not two"]
    assert found["wrong"]["figures"] == {"after": 1}, "a problem does not end the step"
    assert found["raises"]["problems"] == ["exit code 1; last line: ValueError: no such thing"]
    assert found["crashes"]["problems"][0].startswith("killed by SIGSEGV")
    table = (tmp_path / "table.txt").read_text()
    assert [line.split()[1] for line in table.splitlines()[1:2]] == ["passed"]
    assert "one is not two" in table
    assert "nothing for it here" in (tmp_path / "log.txt").read_text()


def test_a_step_that_hangs_loses_its_processes_but_not_its_figures(tool: Any, tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    hangs = (
        f"{TELL}r.figure('before', 1); import subprocess, time; "
        f"child = subprocess.Popen(['sleep', '300']); open({str(pid_file)!r}, 'w').write(str(child.pid)); "
        "print('now it hangs', flush=True); time.sleep(300)"
    )
    begin = time.monotonic()
    found = run(tool, tmp_path, hangs=(hangs, 3.0), next="pass")
    assert time.monotonic() - begin < 15
    assert found["hangs"]["verdict"] == "timeout"
    assert found["hangs"]["figures"] == {"before": 1}
    assert found["hangs"]["problems"] == ["ended after its 3 seconds; last line: now it hangs"]
    assert found["next"]["verdict"] == "passed"
    child = int(pid_file.read_text())
    for _ in range(100):  # the reaper of orphans takes a moment
        if not Path(f"/proc/{child}").exists() or "Z" in Path(f"/proc/{child}/stat").read_text().split()[2]:
            return
        time.sleep(0.05)
    os.kill(child, signal.SIGKILL)
    pytest.fail("the step's own child has outlived it")


def test_all_steps_together_have_a_limit(tool: Any, tmp_path: Path) -> None:
    found = run(tool, tmp_path, 6.5, slow=("import time; time.sleep(60)", 50.0), late="pass")
    assert found["slow"]["verdict"] == "timeout"
    assert 5 < found["slow"]["seconds"] < 10
    assert found["late"]["verdict"] == "skipped"
    assert found["late"]["summary"] == "6 seconds are over"


def test_what_needs_the_extension_is_skipped_without(
    tool: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tool, "built", lambda: False)
    step = tool.Step("ops", 10.0, command=(sys.executable, "-c", "pass"))
    results = tool.Results(tmp_path, [step])
    tool.run_steps([step], results, 60, [], tool.environment(tmp_path))
    assert results.outcomes["ops"].verdict == "skipped"
    assert results.outcomes["ops"].summary == "the extension is not built"


def test_a_killed_run_has_left_what_it_had_measured(tmp_path: Path) -> None:
    """The whole program, ended from outside in the middle of its second step."""
    program = (
        "import sys, gpu_check; steps = (gpu_check.Step('first', 60, False, (sys.executable, '-c', "
        f"{TELL + 'r.figure(1, 2)'!r})), gpu_check.Step('second', 60, False, (sys.executable, '-c', "
        f"{TELL + 'r.figure(3, 4); import time; time.sleep(100)'!r}))); "
        f"gpu_check.run_steps(steps, gpu_check.Results(gpu_check.Path({str(tmp_path)!r}), steps), 90, [], "
        f"gpu_check.environment(gpu_check.Path({str(tmp_path)!r})))"
    )
    env = os.environ | {"PYTHONPATH": str(ROOT / "tools")}
    process = subprocess.Popen([sys.executable, "-c", program], env=env, start_new_session=True)
    try:
        second = {}
        for _ in range(600):
            time.sleep(0.05)
            if (tmp_path / "results.json").is_file():
                second = json.loads((tmp_path / "results.json").read_text())["steps"]["second"]
                if second["figures"]:
                    break
    finally:
        process.kill()
        process.wait()
    steps = json.loads((tmp_path / "results.json").read_text())["steps"]
    assert steps["first"]["verdict"] == "passed"
    assert steps["first"]["figures"] == {"1": 2}
    assert steps["second"]["verdict"] == "running"
    assert steps["second"]["figures"] == {"3": 4}


def test_the_wheels_are_importable_and_come_first(tool: Any, tmp_path: Path) -> None:
    wheels, out = tmp_path / "wheels", tmp_path / "out"
    wheels.mkdir()
    out.mkdir()
    with zipfile.ZipFile(wheels / "pydantic-0.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("pydantic/__init__.py", "WHERE = 'brought along'\n")
    site = tmp_path / "site"
    tool.unpack(wheels, site)
    text = TELL + "import pydantic, megarl; r.figure('where', pydantic.WHERE)"
    step = tool.Step("imports", 20.0, needs=False, command=(sys.executable, "-c", text))
    results = tool.Results(out, [step])
    tool.run_steps([step], results, 60, [], tool.environment(site))
    assert results.outcomes["imports"].figures == {"where": "brought along"}


def test_the_wheels_are_the_versions_of_the_project(tool: Any) -> None:
    lock = ROOT / "requirements" / "cuda.lock"
    if not lock.is_file():
        lock = ROOT / "requirements" / "cpu.lock"
    lines = [line.split("#")[0].rstrip("\\ \n") for line in lock.read_text().splitlines()]
    locked = [Requirement(line) for line in lines if line and line[0].isalpha()]
    versions = {canonicalize_name(found.name): str(found.specifier) for found in locked}
    brought = {
        canonicalize_name(found.name): str(found.specifier) for found in map(Requirement, tool.requirements())
    }
    assert len(brought) == len(tool.PACKAGES)
    assert {name: version for name, version in brought.items() if name in versions} == {
        name: version for name, version in versions.items() if name in brought
    }
    assert {"pydantic", "pydantic-core", "safetensors", "pytest-timeout"} <= versions.keys()
    assert brought["megatron-core"].startswith("==")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--out or --prepare is needed"),
        (
            ["--out", "o", "--only", "ops,speed"],
            "--only: there is no step 'speed'; there are versions, build",
        ),
        (["--out", "o", "--wheels", "/nowhere"], "--wheels: /nowhere has no wheels; --prepare makes them"),
        (["--out", "o", "--minutes", "0"], "--minutes and --stretch must be positive"),
    ],
)
def test_arguments(tool: Any, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        tool.main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_a_step_tells_what_went_wrong_in_it(module: Callable[[str], Any], tmp_path: Path) -> None:
    """``python -m gpu_checks``: an exception is a problem, and numbers that JSON lacks are words."""
    command = [sys.executable, "-m", "gpu_checks", "spinning", "--out", str(tmp_path), "--quick"]
    env = os.environ | {"PYTHONPATH": f"{ROOT / 'tools'}{os.pathsep}{ROOT}", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    mark = module("gpu_checks.report").MARK
    told = [json.loads(x.removeprefix(mark)) for x in done.stdout.splitlines() if x.startswith(mark)]
    assert done.returncode == 1
    assert len(told) == 1 and ("CUDA" in told[0]["problem"] or "NVIDIA" in told[0]["problem"])


def test_figures_are_plain(module: Callable[[str], Any], capsys: pytest.CaptureFixture[str]) -> None:
    report = module("gpu_checks.report").Report(Path())
    report.figure("x", {"a": float("nan"), "b": [1.23456789, 2], "c": (None, "d")})
    assert json.loads(capsys.readouterr().out.split(" ", 1)[1]) == {
        "figure": "x",
        "value": {"a": "nan", "b": [1.2346, 2], "c": [None, "d"]},
    }
    assert report.num_problems == 0


def test_a_toolkit_behind_a_script_is_found(
    module: Callable[[str], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """nvcc on PATH is a script; headers and libcudart are in the wheels that torch brought."""
    home, scripts, site = tmp_path / "cuda-13", tmp_path / "bin", tmp_path / "site"
    (home / "bin").mkdir(parents=True)
    (site / "nvidia" / "cu13" / "include").mkdir(parents=True)
    (site / "nvidia" / "cu13" / "lib").mkdir()
    library = site / "nvidia" / "cu13" / "lib" / "libcudart.so.13"
    library.write_text("a library")
    scripts.mkdir()
    (scripts / "nvcc").write_text(f"#!/bin/sh\necho '#$ _HERE_=x' >&2\necho '#$ TOP={home}/bin/..' >&2\n")
    (scripts / "nvcc").chmod(0o755)
    build = module("gpu_checks.build")
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.setenv("PATH", str(scripts))
    monkeypatch.setattr(sys, "path", [str(site)])
    assert build.toolkit() == home
    work = tmp_path / "work"
    work.mkdir()
    parts = build.missing_parts(home, work)
    assert parts == {"CPATH": [str(site / "nvidia" / "cu13" / "include")], "LIBRARY_PATH": [str(work)]}
    assert (work / "libcudart.so").resolve() == library
    (home / "include").mkdir()
    (home / "include" / "cuda_runtime.h").touch()
    (home / "lib64").mkdir()
    (home / "lib64" / "libcudart.so").touch()
    assert build.missing_parts(home, work) == {}, "a whole toolkit needs nothing"


def test_the_files_with_tests_for_a_gpu_are_found(module: Callable[[str], Any]) -> None:
    files = module("gpu_checks.gpu_tests").files()
    assert {"tests/ops/test_cuda.py", "tests/weights/test_cuda_ipc.py"} <= set(files)
    assert "tests/ops/test_policy_loss.py" not in files


def test_waits_are_counted_where_megarl_or_megatron_asks(
    module: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    microbatch = module("gpu_checks.microbatch")
    modes = []
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    # As torch's own code between MegaRL's and the wait.
    where = f"{ROOT}/.venv/lib/megarl/torch/t.py"
    inner = compile("def item(warn): warn('called a synchronizing CUDA operation')", where, "exec")
    where = f"{ROOT}/megarl/trainer/megatron/a.py"
    outer = compile("def loss(warn):\n    item(warn)\n    item(warn)", where, "exec")
    names: dict[str, Any] = {}
    exec(inner, names)
    exec(outer, names)
    found: Counter[str] = Counter()
    with microbatch.counting_waits(found):
        names["loss"](warnings.warn)
        warnings.warn("something else", stacklevel=1)
    assert {place.split()[0]: count for place, count in found.items()} == {
        "megarl/trainer/megatron/a.py:2": 1,
        "megarl/trainer/megatron/a.py:3": 1,
    }
    assert modes == ["warn", "default"]


def test_the_guide_lists_the_steps_in_their_order_with_their_limits(tool: Any) -> None:
    lines = (ROOT / "docs" / "performance.md").read_text().splitlines()
    rows = [[cell.strip() for cell in line.split("|")[1:3]] for line in lines if line.count("|") == 4]
    listed = [(name, limit) for name, limit in rows if limit.endswith(" s") and limit[:-2].isdigit()]
    assert listed == [(step.name, f"{step.limit:.0f} s") for step in tool.STEPS]
