"""MegaRL from Python: ``megarl.grpo("run.yaml", reward=my_reward)`` in a script or a notebook.

Each run is the command of the same name in its own process: it may use several ranks, returns all memory
when it ends, and can be repeated in one session. Functions are passed by value: a notebook may define them.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from megarl.cluster.by_value import by_value
from megarl.config.section import Section
from megarl.errors import UserError
from megarl.run_directory import RunDirectory, read_metrics

Reward = Callable[[str, str, str], float]
Config = Section | str | os.PathLike[str] | Mapping[str, Any] | None
_CODE = "megarl_given"  # modules with functions that were handed over; in <run.dir>/code


@dataclass(frozen=True, slots=True)
class Result:
    """A finished run: ``summary`` is summary.json, ``metrics`` has a dict per line of metrics.jsonl."""

    directory: Path
    summary: dict[str, Any]
    metrics: list[dict[str, float]]

    @property
    def model(self) -> Path:
        """The trained model, a Hugging Face directory (<run.dir>/hf)."""
        return self.directory / "hf"

    @property
    def report(self) -> Path:
        """The HTML report."""
        return self.directory / "report.html"

    def _repr_html_(self) -> str:
        rows = "".join(f"<tr><td>{name}</td><td>{value}</td></tr>" for name, value in self.summary.items())
        return f"<p>{self.directory} (<a href='{self.report}'>report</a>)</p><table>{rows}</table>"


def sft(config: Config = None, **settings: Any) -> Result:
    """Supervised fine-tuning; see :func:`run`."""
    return run("sft", config, settings)


def dpo(config: Config = None, **settings: Any) -> Result:
    """Training on preference pairs (DPO, IPO, KTO, SimPO, ORPO); see :func:`run`."""
    return run("dpo", config, settings)


def rm(config: Config = None, **settings: Any) -> Result:
    """Training of a reward model; see :func:`run`."""
    return run("rm", config, settings)


def grpo(
    config: Config = None,
    *,
    reward: Reward | Mapping[Reward, float] | Sequence[Reward] | None = None,
    loss: Callable[..., Any] | None = None,
    advantage: Callable[..., Any] | None = None,
    **settings: Any,
) -> Result:
    """Group relative policy optimisation; see :func:`run`.

    Args:
        config: as for :func:`run`.
        reward: function (prompt, response, answer) -> float, a list of them, or {function: weight};
            it replaces the environment of training and held-out rows (sources jsonl, file and hf).
        loss: a policy term of your own, in place of algorithm.loss (docs/guides/custom-losses.md).
        advantage: an advantage of your own, in place of algorithm.advantage.
        settings: as for :func:`run`.
    """
    return run("grpo", config, settings, reward=reward, loss=loss, advantage=advantage)


def ppo(
    config: Config = None,
    *,
    reward: Reward | Mapping[Reward, float] | Sequence[Reward] | None = None,
    **settings: Any,
) -> Result:
    """PPO with a critic; ``reward`` as in :func:`grpo`, else see :func:`run`."""
    return run("ppo", config, settings, reward=reward)


def distill(config: Config = None, **settings: Any) -> Result:
    """On-policy distillation; see :func:`run`."""
    return run("distill", config, settings)


def evaluate(config: Config = None, *, reward: Any = None, **settings: Any) -> Result:
    """`megarl eval`: accuracy, pass@k and cons@k; see :func:`run`."""
    return run("eval", config, settings, reward=reward)


def plan(config: Config = None, *, num_gpus: int, **settings: Any) -> dict[str, Any]:
    """`megarl plan`: memory and weight transfers of a layout per GPU, as --json writes them."""
    from megarl.config.load import load_config
    from megarl.config.plan import PlanConfig
    from megarl.simulate.run import simulate

    with tempfile.TemporaryDirectory(prefix="megarl-") as folder:
        path = _config_file(config, Path(folder))
        loaded = load_config(PlanConfig, path, _overrides(settings), check_files=False)
    return simulate(loaded, num_gpus).as_json()


def convert_checkpoint(direction: str, source: str | Path, target: str | Path, *options: str) -> None:
    """`megarl convert`; ``direction`` is hf-to-megatron or megatron-to-hf, ``options`` the command's."""
    from megarl.cli import main

    code = main(["convert", direction, str(source), str(target), *options])
    if code:
        raise UserError(f"convert {direction} failed with exit code {code}")


def run(
    job: str,
    config: Config = None,
    settings: Mapping[str, Any] | None = None,
    *,
    reward: Any = None,
    loss: Any = None,
    advantage: Any = None,
) -> Result:
    """Run a job to its end, or resume it; what it prints appears here as it comes.

    Args:
        job: sft, dpo, rm, grpo, ppo, distill or eval.
        config: a YAML file, a configuration object, a mapping of sections, or None: all is in ``settings``.
        settings: sections as mappings, ``{"training": {"num_steps": 20}}``, or dotted keys,
            ``{"training.num_steps": 20}``; they replace the configuration's.
        reward: see :func:`grpo`.
        loss: see :func:`grpo`.
        advantage: see :func:`grpo`.

    Returns:
        The run directory's content.

    Raises:
        UserError: the configuration or the data are wrong; the message is the command's.
        RuntimeError: the run failed.
    """
    from megarl.config.load import load_config
    from megarl.jobs import JOBS

    with tempfile.TemporaryDirectory(prefix="megarl-") as folder:
        path = _config_file(config, Path(folder))
        code = Path(folder) / "code"
        overrides = _overrides(settings or {})
        for name, function in (("loss", loss), ("advantage", advantage)):
            if function is not None:
                overrides.append(f"algorithm.{name}={_import_path(function, code)}")
        # The command checks files and functions, and says what is wrong in the same words.
        read = load_config(JOBS[job].root(), path, overrides, check_files=False)
        if reward is not None:
            environment = json.dumps(_environment(reward, code))
            splits = [name for name in ("train", "held_out") if getattr(read.data, name, None) is not None]
            overrides += [f"data.{name}.environment={environment}" for name in splits]
        directory = RunDirectory(Path(read.run.dir).resolve())
        if code.is_dir():  # the run keeps it: it is resumed with the same functions
            code = _keep(code, directory.path)
        arguments = [job, *(["--config", str(path)] if path else []), *overrides]
        _command(arguments, code if code.is_dir() else None)
    return read_result(directory.path)


def read_result(directory: str | Path) -> Result:
    """The :class:`Result` of a run directory."""
    run_directory = RunDirectory(directory)
    summary = run_directory.summary_path
    return Result(
        run_directory.path,
        json.loads(summary.read_text(encoding="utf-8")) if summary.exists() else {},
        [{name: float(value) for name, value in row.items()} for row in read_metrics(run_directory.path)],
    )


# --- configuration ------------------------------------------------------------------------------------


def _config_file(config: Config, folder: Path) -> Path | None:
    """The configuration as a file that the command reads."""
    from megarl.config.load import dump_config
    from megarl.config.yaml_text import dump_yaml

    if config is None or isinstance(config, str | os.PathLike):
        return None if config is None else Path(config)
    path = folder / "config.yaml"
    text = dump_config(config) if isinstance(config, Section) else dump_yaml(dict(config))
    path.write_text(text, encoding="utf-8")
    return path


def _overrides(settings: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Settings as the command line's key=value, numbers, lists and texts in YAML's own form."""
    found: list[str] = []
    for name, value in settings.items():
        key = f"{prefix}{name}"
        if isinstance(value, Mapping) and value and "source" not in value and "kind" not in value:
            found += _overrides(value, f"{key}.")
        elif isinstance(value, Section):
            found.append(f"{key}={json.dumps(value.model_dump(mode='json'))}")
        elif isinstance(value, str | os.PathLike):
            found.append(f"{key}={json.dumps(os.fspath(value))}")
        elif isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{key}: expected a finite number (got {value})")
        else:
            found.append(f"{key}={json.dumps(value)}")
    return found


# --- functions ----------------------------------------------------------------------------------------


def _environment(reward: Any, code: Path) -> dict[str, Any]:
    if callable(reward):
        reward = [reward]
    weights = list(reward.values()) if isinstance(reward, Mapping) else None
    paths = [_import_path(function, code) for function in reward]
    return {"kind": "function", "paths": paths, "weights": weights}


def _import_path(function: Any, code: Path) -> str:
    """Return "module:name" of a function; one without an installed module is written to ``code``."""
    if isinstance(function, str):
        return function
    if not callable(function):
        raise UserError(f"expected a function (got {type(function).__name__})")
    module, name = getattr(function, "__module__", None), getattr(function, "__qualname__", "")
    if module and module != "__main__" and name.isidentifier() and _is_importable(module, name, function):
        return f"{module}:{name}"
    pickled = by_value(function)
    stem = f"{_CODE}_{hashlib.blake2b(pickled, digest_size=8).hexdigest()}"
    code.mkdir(parents=True, exist_ok=True)
    (code / f"{stem}.pkl").write_bytes(pickled)
    label = getattr(function, "__name__", "")
    label = label if label.isidentifier() else "function"
    (code / f"{stem}.py").write_text(
        "import pathlib, pickle\n"
        f'{label} = pickle.loads(pathlib.Path(__file__).with_suffix(".pkl").read_bytes())\n',
        encoding="utf-8",
    )
    return f"{stem}:{label}"


def _is_importable(module: str, name: str, function: Any) -> bool:
    """Whether another process finds the same object under that name (not so on a script's own path)."""
    found = sys.modules.get(module)
    file = getattr(found, "__file__", None)
    if found is None or getattr(found, name, None) is not function or file is None:
        return False
    return "site-packages" in Path(file).parts or module.partition(".")[0] == "megarl"


def _keep(code: Path, directory: Path) -> Path:
    kept = directory / "code"
    kept.mkdir(parents=True, exist_ok=True)
    for file in code.iterdir():
        (kept / file.name).write_bytes(file.read_bytes())
    return kept


# --- the process --------------------------------------------------------------------------------------


def _command(arguments: Sequence[str], code: Path | None) -> None:
    """Run the command line in a process, and pass on what it prints.

    Ctrl-C (a notebook's stop button) goes to it once; it writes a checkpoint, and KeyboardInterrupt follows.
    """
    environment = dict(os.environ)
    if code is not None:
        kept = [str(code), *filter(None, [environment.get("PYTHONPATH")])]
        environment["PYTHONPATH"] = os.pathsep.join(kept)
    process = subprocess.Popen(
        [sys.executable, "-m", "megarl", *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
        text=True,
        encoding="utf-8",
        errors="replace",
        start_new_session=True,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    errors: list[str] = []
    threads = [
        threading.Thread(target=_pass_on, args=(process.stdout, sys.stdout, None), daemon=True),
        threading.Thread(target=_pass_on, args=(process.stderr, sys.stderr, errors), daemon=True),
    ]
    for thread in threads:
        thread.start()
    try:
        process.wait()
    except KeyboardInterrupt:
        process.send_signal(signal.SIGINT)
        process.wait()
        raise
    finally:
        if process.poll() is None:
            process.kill()
        for thread in threads:
            thread.join()
    if process.returncode == 0:
        return
    said = [line.partition("error: ")[2] for line in errors if line.startswith("error: ")]
    if process.returncode == 2:
        raise UserError("\n".join(said) or "".join(errors[-5:]).strip())
    end = "".join(errors[-20:])
    raise RuntimeError(f"megarl {arguments[0]} ended with exit code {process.returncode}:\n{end}")


def _pass_on(source: IO[str], target: IO[str], keep: list[str] | None) -> None:
    for line in source:
        if keep is not None:
            keep.append(line.rstrip("\n") if line.startswith("error: ") else line)
        with suppress(OSError, ValueError):
            target.write(line)
            target.flush()
