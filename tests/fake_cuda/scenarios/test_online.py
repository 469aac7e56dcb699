"""Jobs that learn from their own samples: a vLLM engine and the trainer on the fake GPUs.

What the engine answered is recorded, and a CPU learns from the same answers (site/fakecuda_tape.py): losses
and gradients must agree, and so must the engine's logprobs with those of a trainer on another device.
"""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.end_to_end.harness import ROOT, read_lines
from tests.fake_cuda.scenarios.harness import PYTHON, TIMEOUT, Finished, Workbench
from tests.processes import command_line

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

Agree = Callable[..., None]
FP32 = {"loss": 1e-4, "policy_loss": 1e-4, "grad_norm": 1e-4, "entropy": 1e-5, "reward_mean": 0.0}
BF16 = {"loss": 2e-2, "grad_norm": 5e-2, "entropy": 2e-3, "reward_mean": 0.0}
LOGPROBS_AGREE = {"float32": 1e-4, "bfloat16": 0.1}


def learn_alike(
    name: str,
    bench: Workbench,
    agree: Agree,
    *,
    model: Path,
    job: str = "grpo",
    options: dict[str, Any] | None = None,
    on_cpu: dict[str, Any] | None = None,
    launch: tuple[str, ...] = ("-m", "megarl.cli"),
    figures: dict[str, float] = FP32,
) -> Finished:
    """A run on the fake GPUs, and a CPU that learns from its samples; ``on_cpu`` are options of its own."""
    options = options or {}
    tape = bench.folder / f"{name}.tape"
    cuda = bench.run(
        "cuda",
        job,
        name,
        model=model,
        options=options,
        variables={"FAKECUDA_TAPE": f"record:{tape}"},
        launch=launch,
    )
    assert "MegaRL's CUDA kernels" in cuda.log
    cpu = bench.run(
        "cpu",
        job,
        f"{name}-cpu",
        model=model,
        options={**options, "weights.verify": "off", "weights.offload": [], **(on_cpu or {})},
        variables={"FAKECUDA_TAPE": f"replay:{tape}"},
    )
    agree(name, cuda, cpu, figures)
    bound = LOGPROBS_AGREE[options.get("model.dtype", "float32")]
    for run in (cuda, cpu):
        assert 0 < max(run.column("logprob_abs_diff_max")) < bound
    assert max(cuda.column("grad_norm")) > 0, "nothing was learned: no group had different rewards"
    return cuda


def resume_from(run: Finished, step: int, target: Path) -> None:
    """A copy of a run's directory as it was after ``step``."""
    shutil.copytree(run.directory, target)
    for path in (target / "checkpoints").iterdir():
        if path.name != f"step_{step}":
            shutil.rmtree(path)
    (target / "summary.json").unlink()


def answers(run: Finished, folder: str = "samples") -> dict[str, list[str]]:
    return {
        path.name: [row["response"] for row in read_lines(path)]
        for path in (run.directory / folder).iterdir()
    }


def test_grpo(bench: Workbench, agree: Agree) -> None:
    """Weights by cudaIpc, compared by checksums; what can be offloaded is; resumed from a checkpoint."""
    model = bench.taught_model("dense")
    options = {
        "training.num_steps": 3,
        "checkpoint.interval": 1,
        "checkpoint.keep": 9,
        "weights.verify": "checksum",
        "weights.offload": ["gradients", "optimizer", "kv_cache"],
    }
    run = learn_alike("grpo", bench, agree, model=model, options=options)
    assert run.column("weights_bytes_moved") == [0, 0, 0]

    resume_from(run, 1, bench.folder / "grpo-resumed")
    resumed = bench.run("cuda", "grpo", "grpo-resumed", model=model, options=options)
    exact = {"loss": 0.0, "grad_norm": 0.0, "reward_mean": 0.0}
    agree("grpo resumed after step 1, against uninterrupted", resumed, run, exact)
    assert answers(resumed) == answers(run)


def test_grpo_with_an_engine_of_two_ranks(bench: Workbench, agree: Agree) -> None:
    """bfloat16, trainer and engine both tensor parallel over the same two devices."""
    options = {
        "model.dtype": "bfloat16",
        "parallel.num_processes": 2,
        "parallel.tensor_parallel_size": 2,
        "rollout.engine.tensor_parallel_size": 2,
        "weights.verify": "checksum",
    }
    model = bench.taught_model("dense")
    learn_alike("grpo-engine-tp2", bench, agree, model=model, options=options, figures=BF16)


def test_grpo_with_experts_and_router_replay(bench: Workbench, agree: Agree) -> None:
    """Two expert-parallel trainer ranks learn with the experts that vLLM's router chose."""
    options = {
        "rollout.router_replay": True,
        "router.aux_loss_coef": 0.01,
        "parallel.num_processes": 2,
        "parallel.expert_parallel_size": 2,
    }
    model = bench.taught_model("experts", num_experts=4)
    figures = {**FP32, "router_aux_loss": 1e-4, "router_replay_rerouted": 0.05}
    learn_alike("grpo-experts", bench, agree, model=model, options=options, figures=figures)


def test_grpo_lora_under_ray(bench: Workbench, agree: Agree) -> None:
    """`launcher: ray` places two ranks on GPUs; adapters are merged into the engine's weights each step."""
    options = {
        "launcher": "ray",
        "lora.rank": 4,
        "lora.alpha": 8.0,
        "parallel.num_processes": 2,
        "optimizer.distributed": True,
        "optimizer.lr": 1e-2,
    }
    run = learn_alike(
        "grpo-lora-ray",
        bench,
        agree,
        model=bench.taught_model("dense"),
        options=options,
        on_cpu={"launcher": "auto"},
    )
    assert "Ray: 2 ranks on 1 node" in run.output


def test_ppo_under_torchrun(bench: Workbench, agree: Agree) -> None:
    """Policy and critic on two pipeline stages."""
    launch = (
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "--master-port",
        "29531",
        "-m",
        "megarl",
    )
    options = {"parallel.pipeline_parallel_size": 2}
    figures = {"loss": 1e-4, "grad_norm": 1e-4, "entropy": 1e-5, "value_loss": 1e-4, "reward_mean": 0.0}
    learn_alike(
        "ppo",
        bench,
        agree,
        job="ppo",
        model=bench.taught_model("dense"),
        options=options,
        on_cpu={"parallel.num_processes": 2},
        launch=launch,
        figures=figures,
    )


def test_an_engine_that_dies_is_started_again(bench: Workbench) -> None:
    """Killed between two steps: the run goes on with a new engine and the trainer's weights."""
    options = {"training.num_steps": 4, "weights.verify": "checksum"}
    model = bench.taught_model("dense")
    command = bench.command("grpo", "grpo-killed", model=model, options=options)
    log, metrics = bench.folder / "grpo-killed.log", bench.folder / "grpo-killed" / "metrics.jsonl"
    with log.open("w") as stream:
        process = subprocess.Popen(
            command, cwd=ROOT, env=bench.variables("cuda"), stdout=stream, stderr=subprocess.STDOUT
        )
    deadline = time.monotonic() + TIMEOUT
    while not any(line["step"] == 1 for line in read_lines(metrics)):
        assert process.poll() is None, log.read_text()[-6000:]
        assert time.monotonic() < deadline, log.read_text()[-6000:]
        time.sleep(0.01)
    engines = [
        p for p in psutil.Process(process.pid).children(recursive=True) if "EngineActor" in command_line(p)
    ]
    assert engines, "no engine to kill"
    for engine in engines:
        engine.send_signal(signal.SIGKILL)
    assert process.wait(TIMEOUT) == 0, log.read_text()[-6000:]
    bench.check_nothing_was_skipped()
    run = Finished(bench.folder / "grpo-killed", log.read_text())
    assert len(run.column("grad_norm")) == 4
    assert max(run.column("logprob_abs_diff_max")) < LOGPROBS_AGREE["float32"]


GREEDY = """
import json, sys, torch, transformers
directory, prompts = sys.argv[1], json.load(sys.stdin)
tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
for prompt in prompts:
    ids = torch.tensor([tokenizer(prompt)["input_ids"]])
    with torch.no_grad():
        out = model.generate(ids, max_new_tokens=6, do_sample=False)[0, ids.shape[1]:]
    print(json.dumps(tokenizer.decode(out, skip_special_tokens=True)))
"""


def test_eval_answers_as_transformers(bench: Workbench) -> None:
    """`megarl eval`: greedy answers of vLLM on the fake GPU are those of transformers on a CPU."""
    model = bench.taught_model("dense")
    run = bench.run("cuda", "eval", "eval", model=model)
    rows = read_lines(run.directory / "samples" / "step_0.jsonl")
    ended = subprocess.run(
        [PYTHON, "-c", GREEDY, str(model)],
        input=json.dumps([row["prompt"] for row in rows]),
        env=bench.variables("cpu"),
        capture_output=True,
        text=True,
        check=True,
    )
    expected = [json.loads(line) for line in ended.stdout.splitlines()]
    assert [row["response"].strip() for row in rows] == [text.strip() for text in expected]
    assert len(rows) == 8
