"""Check one GPU in ten minutes: build the extension, run the tests marked gpu, measure what needs a GPU.

Each step is a process with its own time limit; whatever one of them does, the next one runs. The verdict
(passed, failed, timeout or skipped) and the figures of every step go into one results.json, rewritten with
every figure, and into one table. docs/performance.md explains the figures.

    python tools/gpu_check.py --prepare wheels               # on a machine with a network
    python tools/gpu_check.py --wheels wheels --out results  # on the machine with the GPU, torch and nvcc

Exit code 0: nothing failed; 1: a step failed or timed out; 2: invalid arguments.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from gpu_checks.report import EXIT_SKIPPED, MARK

ROOT = Path(__file__).resolve().parents[1]
_SHORTEST = 5.0  # seconds; no step is started with less time left
PYTHON, PLATFORMS = "3.12", ("manylinux_2_28", "manylinux_2_24", "manylinux_2_17", "manylinux2014")
# The steps' dependencies besides torch and numpy; no other package is needed.
PACKAGES = (
    *("megatron-core", "pydantic", "pydantic-core", "annotated-types", "typing-inspection"),
    *(
        "typing-extensions",
        "packaging",
        "PyYAML",
        "safetensors",
        "rich",
        "markdown-it-py",
        "mdurl",
        "Pygments",
    ),
    *("pytest", "pytest-timeout", "iniconfig", "pluggy"),
)


@dataclass(frozen=True)
class Step:
    """One file of tools/gpu_checks. A step that ``needs`` the extension is skipped without it."""

    name: str
    limit: float  # seconds
    needs: bool = True
    command: tuple[str, ...] = ()  # instead of the file

    def arguments(self, options: list[str]) -> list[str]:
        """Return the command line."""
        return list(self.command) or [sys.executable, "-m", "gpu_checks", self.name, *options]


# More than nine minutes together: no step is expected to take half of its limit.
STEPS = (
    Step("versions", 60, needs=False),
    Step("build", 240, needs=False),
    Step("gpu_tests", 120),
    Step("sdpa", 60, needs=False),
    Step("context_attention", 40),
    Step("trainer", 100),
    Step("cuda_ipc", 60),
    Step("spinning", 40, needs=False),
    Step("ops", 60),
    Step("microbatch", 90),
)


@dataclass
class Outcome:
    """The state of one step, from its start."""

    verdict: str = "running"
    seconds: float = 0.0
    summary: str = ""
    problems: list[str] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)

    def take(self, message: dict[str, Any]) -> None:
        """Record a message of gpu_checks/report.py."""
        if "figure" in message:
            self.figures[message["figure"]] = message["value"]
        elif "problem" in message:
            self.problems.append(message["problem"])
        else:
            self.summary = message["summary"]


class Results:
    """All outcomes; written whenever one changes, so a killed run keeps its measurements."""

    def __init__(self, folder: Path, steps: list[Step]) -> None:
        self.folder = folder
        self.outcomes = {step.name: Outcome("not run") for step in steps}

    def write(self) -> None:
        """Replace results.json and table.txt."""
        whole = {"steps": {name: vars(outcome) for name, outcome in self.outcomes.items()}}
        for name, text in (("results.json", json.dumps(whole, indent=1)), ("table.txt", self.table())):
            partial = self.folder / f".{name}"
            partial.write_text(text + "\n")
            partial.replace(self.folder / name)

    def table(self) -> str:
        """Return one line per step, and one per problem."""
        lines = [f"{'step':18} {'verdict':8} {'seconds':>7}  "]
        for name, outcome in self.outcomes.items():
            lines.append(f"{name:18} {outcome.verdict:8} {outcome.seconds:7.1f}  {outcome.summary}".rstrip())
            lines += [f"{'':18} - {problem}" for problem in outcome.problems]
        return "\n".join(lines)

    def failed(self) -> bool:
        """Return True if a step failed or timed out."""
        return any(outcome.verdict in ("failed", "timeout") for outcome in self.outcomes.values())


def run_step(
    step: Step, limit: float, results: Results, options: list[str], env: dict[str, str], log: IO[str]
) -> None:
    """Run one step until its end or its limit, recording its messages."""
    outcome = results.outcomes[step.name] = Outcome()
    results.write()
    begin = time.monotonic()
    process = subprocess.Popen(
        step.arguments(options),
        cwd=ROOT,
        env=env,
        text=True,
        errors="replace",
        start_new_session=True,  # so its child processes end with it
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert process.stdout is not None
    last = [""]

    def read(pipe: IO[str]) -> None:
        for line in pipe:
            message = _message(line)
            if message is not None:
                outcome.take(message)
                outcome.seconds = round(time.monotonic() - begin, 1)
                results.write()
            else:
                last[0] = line.strip() or last[0]
                log.write(line)
                log.flush()

    reader = threading.Thread(target=read, args=(process.stdout,), daemon=True)
    reader.start()
    try:
        code = process.wait(limit)
    except subprocess.TimeoutExpired:
        code = None
    finally:
        _end_group(process)
    reader.join(5)
    outcome.seconds = round(time.monotonic() - begin, 1)
    if code is None:
        outcome.verdict = "timeout"
        outcome.problems.append(f"ended after its {limit:.0f} seconds; last line: {last[0][:200]}")
    elif code == EXIT_SKIPPED:
        outcome.verdict = "skipped"
    elif code == 0 and not outcome.problems:
        outcome.verdict = "passed"
    else:
        outcome.verdict = "failed"
        if not outcome.problems:
            outcome.problems.append(f"{_ending(code)}; last line: {last[0][:200]}")
    results.write()


def _message(line: str) -> dict[str, Any] | None:
    """Parse a line of gpu_checks/report.py; None for other lines, and for interleaved ones."""
    if not line.startswith(MARK):
        return None
    try:
        found = json.loads(line.removeprefix(MARK))
    except json.JSONDecodeError:
        return None
    return found if isinstance(found, dict) else None


def _end_group(process: subprocess.Popen[str]) -> None:
    """End the remaining processes of a step."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    process.wait()


def _ending(code: int) -> str:
    return f"exit code {code}" if code >= 0 else f"killed by {signal.Signals(-code).name}"


def run_steps(
    steps: list[Step], results: Results, seconds: float, options: list[str], env: dict[str, str]
) -> None:
    """Run all steps within ``seconds``; skip those without time left."""
    deadline = time.monotonic() + seconds
    with (results.folder / "log.txt").open("w") as log:
        for step in steps:
            left = deadline - time.monotonic()
            reason = f"{seconds:.0f} seconds are over" if left < _SHORTEST else ""
            if step.needs and not built():
                reason = "the extension is not built"
            if reason:
                results.outcomes[step.name] = Outcome("skipped", summary=reason)
                results.write()
                continue
            print(f"== {step.name}", file=log, flush=True)
            run_step(step, min(step.limit, left), results, options, env, log)
            print(f"{step.name}: {results.outcomes[step.name].verdict}", flush=True)


def built() -> bool:
    """Return True if megarl._C for this Python is built in the tree."""
    return any((ROOT / "megarl").glob(f"_C.cpython-{sys.version_info[0]}{sys.version_info[1]}-*.so"))


# --- wheels for a machine without a network ----------------------------------------------------------------


def pinned(name: str) -> str | None:
    """Return ``name==version`` as the project pins it, for CUDA first, then for CPUs; None if it does not."""
    spelled = re.compile(rf"(?<![\w.-]){'[-_.]'.join(name.split('-'))}\s*==\s*([\w.]+)", re.IGNORECASE)
    for file in ("requirements/cuda.lock", "requirements/cpu.lock", "pyproject.toml"):
        path = ROOT / file
        found = spelled.search(path.read_text()) if path.is_file() else None
        if found:
            return f"{name}=={found[1]}"
    return None


def requirements() -> list[str]:
    """Return the requirements: at the project's versions, else the newest."""
    return [pinned(name) or name for name in PACKAGES]


def prepare(folder: Path) -> int:
    """Download the wheels for the other machine into ``folder``; return an exit code."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.whl"):
        old.unlink()
    platforms = [part for name in PLATFORMS for part in ("--platform", f"{name}_x86_64")]
    command = ["download", "--no-deps", "--only-binary=:all:", "--python-version", PYTHON, *platforms]
    command += ["--implementation", "cp", "--quiet", "--dest", str(folder), *requirements()]
    pip = next(_pips(), None)
    if pip is None:
        print("gpu_check: --prepare needs pip or uv", file=sys.stderr)
        return 2
    if subprocess.run([*pip, *command]).returncode:
        return 1
    wheels = sorted(folder.glob("*.whl"))
    print(f"{folder}: {len(wheels)} wheels, {sum(w.stat().st_size for w in wheels) / 2**20:.1f} MiB")
    return 0


def _pips() -> Iterator[list[str]]:
    for python in (sys.executable, "python3"):
        if subprocess.run([python, "-m", "pip", "--version"], capture_output=True).returncode == 0:
            yield [python, "-m", "pip"]
    if shutil.which("uv"):
        yield ["uv", "tool", "run", "pip"]


def unpack(wheels: Path, site: Path) -> None:
    """Make the wheels importable from ``site`` by unpacking them, without pip and network."""
    for wheel in sorted(wheels.glob("*.whl")):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(site)


def environment(site: Path) -> dict[str, str]:
    """Return the environment variables of every step: this tree, the wheels, no network access."""
    paths = [str(site), str(ROOT), str(ROOT / "tools"), os.environ.get("PYTHONPATH", "")]
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    return inherited | {
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
        "PYTHONUNBUFFERED": "1",
        "GLOO_SOCKET_IFNAME": os.environ.get("GLOO_SOCKET_IFNAME", "lo"),  # the host's name may not resolve
        "NCCL_SOCKET_IFNAME": os.environ.get("NCCL_SOCKET_IFNAME", "lo"),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    names = [step.name for step in STEPS]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="folder for results.json, table.txt, log.txt and a trace")
    parser.add_argument("--wheels", type=Path, help="folder of --prepare; without it, installed packages")
    parser.add_argument("--prepare", type=Path, metavar="DIR", help="download the wheels into DIR and exit")
    parser.add_argument("--only", default="", help=f"steps, separated by commas: {','.join(names)}")
    parser.add_argument("--minutes", type=float, default=9.0, help="for all steps together; default 9")
    parser.add_argument(
        "--quick", action="store_true", help="small sizes, for a dry run: figures are meaningless"
    )
    parser.add_argument(
        "--stretch", type=float, default=1.0, help="multiplies every limit, for slow machines"
    )
    parsed = parser.parse_args(arguments)
    if parsed.prepare is None and parsed.out is None:
        parser.error("--out or --prepare is needed")
    if parsed.wheels is not None and not any(parsed.wheels.glob("*.whl")):
        parser.error(f"--wheels: {parsed.wheels} has no wheels; --prepare makes them")
    parsed.only = [name for name in parsed.only.split(",") if name]
    for name in parsed.only:
        if name not in names:
            parser.error(f"--only: there is no step {name!r}; there are {', '.join(names)}")
    if parsed.minutes <= 0 or parsed.stretch <= 0:
        parser.error("--minutes and --stretch must be positive")
    return parsed


def main(arguments: list[str] | None = None) -> int:
    """Prepare, or run the steps; return the exit code."""
    parsed = parse_arguments(arguments)
    if parsed.prepare is not None:
        return prepare(parsed.prepare)
    chosen = [step for step in STEPS if not parsed.only or step.name in parsed.only]
    steps = [Step(step.name, step.limit * parsed.stretch, step.needs) for step in chosen]
    parsed.out.mkdir(parents=True, exist_ok=True)
    results = Results(parsed.out, steps)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so the finally below runs
    with tempfile.TemporaryDirectory(prefix="gpu_check") as work:
        if parsed.wheels is not None:
            unpack(parsed.wheels, Path(work))
        options = ["--out", str(parsed.out.resolve()), *(["--quick"] if parsed.quick else [])]
        if parsed.wheels is not None:
            options += ["--wheels", str(parsed.wheels.resolve())]
        try:
            run_steps(steps, results, parsed.minutes * 60, options, environment(Path(work)))
        finally:
            results.write()
            print(results.table())
    return int(results.failed())


if __name__ == "__main__":
    sys.exit(main())
