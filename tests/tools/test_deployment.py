"""Deployment files are valid for their readers: bash, YAML and Dockerfiles with consistent names."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from megarl import cli

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted((ROOT / "tools" / "slurm").glob("*.sbatch"))
DOCKERFILES = sorted((ROOT / "docker").glob("Dockerfile*"))
DOCKER_WORDS = {"ARG", "FROM", "RUN", "WORKDIR", "COPY", "ENV", "CMD", "ENTRYPOINT"}


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((ROOT / "tools" / "kubernetes" / name).read_text()))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_slurm_scripts(script: Path) -> None:
    subprocess.run(["bash", "-n", str(script)], check=True)
    lines = [line for line in script.read_text().splitlines() if line.startswith("#SBATCH ")]
    options = [re.fullmatch(r"#SBATCH --([a-z-]+)(=\S+)?", line) for line in lines]
    assert all(options), lines
    assert {"account", "partition", "nodes", "time", "gpus-per-node", "signal"} <= {
        option[1] for option in options if option
    }


def fake_slurm(folder: Path) -> None:
    """Fake srun, scontrol and ray that record their arguments."""
    bodies = {
        "srun": """
            if [[ "$*" = *launcher=ray* ]]; then  # ranks wait for the nodes
              until [[ $(grep -c "ray start" "$LOG") = 2 ]]; do /bin/sleep 0.05; done
            fi
            echo "srun $*" >> "$LOG"
            [[ "$*" != *hostname* ]] || echo 10.0.0.7
        """,
        "scontrol": "printf 'gpu07\\ngpu08\\n'",
        "sleep": "exec /bin/sleep 0.1",
    }
    for name, body in bodies.items():
        path = folder / name
        path.write_text(f"#!/bin/bash\n{body}\n")
        path.chmod(0o755)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_slurm_scripts_start_megarl(script: Path, tmp_path: Path) -> None:
    """Run for real, with Slurm's programs replaced: what they would have been asked to do."""
    fake_slurm(tmp_path)
    log = tmp_path / "log"
    environment = {
        "PATH": f"{tmp_path}:/usr/bin:/bin",
        "LOG": str(log),
        "MEGARL": str(tmp_path),
        "SLURM_NNODES": "2",
        "SLURM_JOB_NODELIST": "gpu[07-08]",
        "SLURM_CPUS_ON_NODE": "96",
        "SLURM_NTASKS_PER_NODE": "1" if "ray" in script.name else "8",
        "SLURM_GPUS_PER_NODE": "8",
    }
    command = ["bash", str(script), "grpo", "--config", "my run.yaml", "training.num_steps=3"]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=30)
    assert ended.returncode == 0, ended.stderr
    calls = log.read_text().splitlines()
    assert "-m megarl grpo --config my run.yaml training.num_steps=3" in calls[-1]
    if "ray" in script.name:
        assert calls[-1].endswith("launcher=ray parallel.num_processes=16")
        starts = [call for call in calls if "ray start" in call]
        assert any("--head --node-ip-address=10.0.0.7 --port=6379 --num-gpus=8" in call for call in starts)
        assert any("--nodes=1 --ntasks-per-node=1 --exclude=gpu07" in call for call in starts)
        computing, cores = starts, "96"
    else:
        computing, cores = calls, "12"
    # What Slurm gives a step that asks for nothing: one core per task, and GPUs as the site has set it.
    for option in (f"--cpus-per-task={cores}", "--cpu-bind=none", "--gpus-per-node=8", "--gpu-bind=none"):
        assert computing and all(f" {option} " in call for call in computing), option


def test_kubernetes_job() -> None:
    service, job = documents("job.yaml")
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    [container] = pod["containers"]
    words = shlex.split(container["args"][0])
    assert words[:2] == ["exec", "torchrun"]
    assert words[words.index("--nnodes") + 1] == str(spec["completions"]) == str(spec["parallelism"])
    assert words[words.index("--nproc-per-node") + 1] == container["resources"]["limits"]["nvidia.com/gpu"]
    # An indexed pod's host name is the job's with its number, in the subdomain of the headless service.
    assert words[words.index("--master-addr") + 1] == f"{job['metadata']['name']}-0.{pod['subdomain']}"
    assert pod["subdomain"] == service["metadata"]["name"]
    assert service["spec"]["clusterIP"] == "None"
    assert int(words[words.index("--master-port") + 1]) == service["spec"]["ports"][0]["port"]
    assert {m["name"] for m in container["volumeMounts"]} == {v["name"] for v in pod["volumes"]}
    check_command(words[words.index("megarl") + 1 :])


def test_kubernetes_rayjob() -> None:
    [job] = documents("rayjob.yaml")
    cluster = job["spec"]["rayClusterSpec"]
    words = shlex.split(job["spec"]["entrypoint"])
    [workers] = cluster["workerGroupSpecs"]
    gpus = int(workers["rayStartParams"]["num-gpus"])
    assert f"parallel.num_processes={workers['replicas'] * gpus}" in words
    pins = (ROOT / "requirements" / "cpu.lock").read_text()
    assert f"ray=={cluster['rayVersion']} \\\n" in pins
    for group in (cluster["headGroupSpec"], workers):
        pod = group["template"]["spec"]
        for container in pod["containers"]:
            assert {m["name"] for m in container["volumeMounts"]} == {v["name"] for v in pod["volumes"]}
            asked = container["resources"]["limits"].get("nvidia.com/gpu", "0")
            assert asked == group["rayStartParams"]["num-gpus"]
    check_command(words[words.index("megarl") + 1 :])


def check_command(words: list[str]) -> None:
    """The command line takes it."""
    options = cli._parse(words)
    assert options.command == "grpo"
    assert options.config == "CONFIG"


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.name)
def test_dockerfiles(dockerfile: Path) -> None:
    text = "\n".join(line for line in dockerfile.read_text().splitlines() if not line.startswith("#"))
    steps = [step for step in text.replace("\\\n", " ").splitlines() if step.strip()]
    assert {step.split()[0] for step in steps} <= DOCKER_WORDS
    assert next(step.split()[0] for step in steps if step.split()[0] != "ARG") == "FROM"
    for step in steps:
        word, *arguments = step.split()
        if word == "COPY":
            assert all((ROOT / source).exists() for source in arguments[:-1])
        if word == "RUN":
            subprocess.run(["bash", "-n", "-c", step.removeprefix("RUN")], check=True)
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"RUN make ([a-z-]+)", text):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    # What the image is built from must not carry this machine's environment along.
    assert {".venv", "build", "runs"} <= set((ROOT / ".dockerignore").read_text().split())
