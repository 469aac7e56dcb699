"""The real engine on tiny models: HF forwards are the reference for every logprob."""

from __future__ import annotations

import copy
import logging
import os
import signal
import time
from dataclasses import replace
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from megarl.inference.interface import (
    EngineError,
    GeneratedResponse,
    GenerateRequest,
    SamplingConfig,
    WeightPlanError,
)
from megarl.inference.vllm import engine as vllm_engine
from megarl.inference.vllm.engine import VllmEngine
from megarl.records import token_ids
from megarl.weights.sync_plan import Alias, SourceView
from tests.cluster.events import recorded_tasks
from tests.inference.driving import generate
from tests.inference.mini_trainer import check_pause, logprobs_of
from tests.processes import command_line

PLAIN = SamplingConfig(temperature=1.0, stop_token_ids=(), logprobs=True)
TOLERANCE = 1e-4


def by_id(responses: list[GeneratedResponse]) -> dict[str, GeneratedResponse]:
    return {response.request_id: response for response in responses}


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_are_hf_logprobs_after_temperature(trainer: Any, temperature: float) -> None:
    requests = trainer.requests(12, max_new_tokens=20)
    responses = list(generate(trainer.engine, requests, replace(PLAIN, temperature=temperature)))
    assert all(len(r.token_ids) == len(r.logprobs) == 20 and r.finish_reason == "length" for r in responses)
    for response in responses:
        assert (response.token_ids.dtype, response.logprobs.dtype) == (np.int32, np.float32)
        assert response.token_ids.flags.owndata, "no view of Ray's object store"
    assert trainer.logprob_error(requests, responses, temperature) < TOLERANCE


def test_greedy_follows_the_argmax_of_hf(trainer: Any) -> None:
    request = trainer.requests(1, max_new_tokens=12)[0]
    sampling = SamplingConfig(temperature=0.0, stop_token_ids=(), logprobs=False)
    [response] = generate(trainer.engine, [request], sampling)
    ids = list(request.prompt_ids)
    with torch.no_grad():
        for _ in range(12):
            ids.append(int(trainer.model(torch.tensor([ids])).logits[0, -1].argmax()))
    assert response.token_ids.tolist() == ids[len(request.prompt_ids) :]
    assert len(response.logprobs) == 0


def test_a_sleeping_engine_gives_its_cache_back(trainer: Any) -> None:
    requests = trainer.requests(12, max_new_tokens=20)
    before = by_id(list(generate(trainer.engine, requests, PLAIN)))
    process = psutil.Process(trainer.engine.health().pid)
    held = process.memory_full_info().uss
    trainer.engine.sleep()
    assert held - process.memory_full_info().uss > 0.8 * 0.05 * 2**30, "of kv_cache_gib"
    trainer.engine.wake()
    after = by_id(list(generate(trainer.engine, requests, PLAIN)))
    assert {name: r.token_ids.tolist() for name, r in after.items()} == {
        name: r.token_ids.tolist() for name, r in before.items()
    }
    assert trainer.logprob_error(requests, list(after.values()), 1.0) < TOLERANCE


def test_no_daemon_of_ray_runs_that_serves_nobody(trainer: Any) -> None:
    commands = [command_line(child) for child in psutil.Process().children()]
    assert any("gcs_server" in command for command in commands), "Ray's processes are this one's children"
    for word in ("dashboard/dashboard.py", "log_monitor.py", "autoscaler/_private/monitor.py"):
        assert not any(word in command for command in commands), word


def test_ray_keeps_no_record_of_calls_to_the_engine(trainer: Any) -> None:
    list(generate(trainer.engine, trainer.requests(4, max_new_tokens=3), PLAIN))
    time.sleep(2)  # events travel once a second
    assert not any("EngineActor" in name for name in recorded_tasks())


def test_sampling_ends_with_the_first_stop_token_only(trainer: Any) -> None:
    requests = trainer.requests(6, max_new_tokens=30)
    free = by_id(list(generate(trainer.engine, requests, PLAIN)))
    stop = int(free["r0"].token_ids[10])
    stopped = by_id(list(generate(trainer.engine, requests, replace(PLAIN, stop_token_ids=(stop,)))))
    for request_id, response in stopped.items():
        expected = free[request_id].token_ids.tolist()
        if stop in expected:
            expected = expected[: expected.index(stop) + 1]
            assert response.finish_reason == "stop"
        assert response.token_ids.tolist() == expected
    assert trainer.logprob_error(requests, list(stopped.values()), 1.0) < TOLERANCE


def test_a_seed_fixes_the_tokens(trainer: Any) -> None:
    requests = trainer.requests(8, max_new_tokens=16)
    first, second = (by_id(list(generate(trainer.engine, requests, PLAIN))) for _ in range(2))
    assert first == second
    reseeded = [replace(request, seed=request.seed + 1) for request in requests]
    others = by_id(list(generate(trainer.engine, reseeded, PLAIN)))
    assert all(others[i].token_ids.tolist() != first[i].token_ids.tolist() for i in first)


def test_the_engine_reads_the_owners_memory(trainer: Any) -> None:
    [report] = trainer.engine.attach([trainer.weights.alias_plan()])
    assert set(report.aliased) == set(trainer.params)  # by address, inside the mapped storage
    assert report.copied == [] and report.aliased_bytes == trainer.weights.buffer.nbytes
    # Prompts longer than a KV block, so that a forgotten prefix cache would serve old keys and values.
    requests = trainer.requests(4, max_new_tokens=8, prompt_length=70)
    before = list(generate(trainer.engine, requests, PLAIN))
    trainer.change_weights()
    sync = trainer.engine.sync(1)
    after = list(generate(trainer.engine, requests, PLAIN))
    assert sync.bytes_moved == 0
    assert trainer.logprob_error(requests, before, 1.0) > 0.1
    assert trainer.logprob_error(requests, after, 1.0) < TOLERANCE
    assert {r.policy_version for r in before} == {0} and {r.policy_version for r in after} == {1}


def test_copies_convert_and_are_counted(trainer: Any) -> None:
    shared = type(trainer.weights)(trainer.params, "bfloat16")
    with torch.no_grad():  # the reference has the rounded weights (model.bfloat16() would round RoPE too)
        for param in trainer.model.parameters():
            param.copy_(param.bfloat16())
    shared.load(trainer.model)
    [report] = trainer.engine.attach([shared.copy_plan()])
    sync = trainer.engine.sync(7)
    assert report.aliased == [] and set(report.copied) == set(trainer.params)
    assert sync.bytes_moved == report.copied_bytes == 4 * shared.buffer.numel()  # the engine stores fp32
    requests = trainer.requests(6, max_new_tokens=10)
    responses = list(generate(trainer.engine, requests, PLAIN))
    assert trainer.logprob_error(requests, responses, 1.0) < TOLERANCE
    assert {r.policy_version for r in responses} == {7}
    shared.buffer.zero_()  # copied, not aliased: the engine must not see this before the next sync
    again = list(generate(trainer.engine, requests, PLAIN))
    assert by_id(again) == by_id(responses)


def test_a_wrong_plan_is_refused_with_every_violation(trainer: Any) -> None:
    plan = trainer.weights.alias_plan()
    norm = "model.norm.weight"
    aliases = [a for a in plan.aliases if a.param not in (norm, "model.layers.0.mlp.down_proj.weight")]
    aliases.append(Alias(norm, SourceView(0, "bfloat16", 0, (32,), (1,))))
    aliases.append(Alias("model.layers.9.mlp.down_proj.weight", plan.aliases[0].source))
    with pytest.raises(WeightPlanError) as caught:
        trainer.engine.attach([replace(plan, aliases=aliases)])
    assert caught.value.violations == [
        "model.layers.9.mlp.down_proj.weight: no such parameter in the engine",
        f"{norm}: alias has shape (32,), the engine wants (64,)",
        f"{norm}: alias has dtype bfloat16, the engine wants float32",
        "model.layers.0.mlp.down_proj.weight: 0 of 6144 elements are covered",
    ]
    requests = trainer.requests(2, max_new_tokens=5)  # the plan before it still holds
    assert trainer.logprob_error(requests, list(generate(trainer.engine, requests, PLAIN)), 1.0) < TOLERANCE


def test_nothing_is_sampled_past_max_model_len(trainer: Any) -> None:
    [response] = generate(trainer.engine, [GenerateRequest("long", token_ids([5] * 250), 50, 1)], PLAIN)
    assert (len(response.token_ids), response.finish_reason) == (6, "length")
    with pytest.raises(ValueError, match="request full: a prompt of 256 tokens does not fit"):
        generate(trainer.engine, [GenerateRequest("full", token_ids([5] * 256), 50, 1)], PLAIN)


def test_abort_gives_back_what_there_was(trainer: Any) -> None:
    requests = trainer.requests(4, max_new_tokens=200)
    whole = by_id(list(generate(trainer.engine, requests, PLAIN)))
    short = replace(requests[0], request_id="short", max_new_tokens=20)
    responses = []
    for response in generate(trainer.engine, [*requests, short], PLAIN):
        responses.append(response)
        if response.request_id == "short":
            trainer.engine.abort(["r1", "r2", "unknown"])
    ended = by_id(responses)
    assert [ended[f"r{i}"].finish_reason for i in range(4)] == ["length", "abort", "abort", "length"]
    for request_id in ("r1", "r2"):
        count = len(ended[request_id].token_ids)
        assert 19 <= count < 200 and count == len(ended[request_id].logprobs)
        assert ended[request_id].token_ids.tolist() == whole[request_id].token_ids[:count].tolist()


def test_a_consumer_that_leaves_aborts_the_rest(trainer: Any) -> None:
    responses = generate(
        trainer.engine,
        [GenerateRequest("a", token_ids([1]), 3, 1), GenerateRequest("b", token_ids([1]), 250, 1)],
        PLAIN,
    )
    assert next(responses).request_id == "a"
    responses.close()
    deadline = time.monotonic() + 10
    while trainer.engine.health().num_unfinished_requests and time.monotonic() < deadline:
        time.sleep(0.05)
    assert trainer.engine.health().num_unfinished_requests == 0


def test_a_paused_engine_waits_and_takes_weights(trainer: Any) -> None:
    check_pause(trainer, trainer.requests(3, max_new_tokens=10), PLAIN, TOLERANCE)


@pytest.mark.parametrize("trainer", ["qwen3"], indirect=True)
def test_weights_change_in_the_middle_of_samples(trainer: Any) -> None:
    """Every token's logprob is that of the version it is recorded with, given all tokens before it."""
    requests = trainer.requests(4, max_new_tokens=230)
    short = replace(requests[0], request_id="short", max_new_tokens=4)
    responses = generate(trainer.engine, [short, *requests], PLAIN)
    assert next(responses).request_id == "short"  # so the others have tokens too
    trainer.engine.pause()
    try:
        assert trainer.engine.health().num_unfinished_requests == 4
        before = copy.deepcopy(trainer.model)
        trainer.change_weights()
        trainer.engine.sync(1)
    finally:
        trainer.engine.resume()
    finished = list(responses)
    assert len(finished) == 4
    prompts = {request.request_id: request.prompt_ids for request in requests}
    for response in finished:
        assert response.policy_version == 0
        (first, count), (second, rest) = response.version_spans
        assert (first, second, count + rest) == (0, 1, 230) and count > 0
        expected = torch.cat(
            [
                logprobs_of(before, prompts[response.request_id], response.token_ids)[:count],
                logprobs_of(trainer.model, prompts[response.request_id], response.token_ids)[count:],
            ]
        )
        assert (expected - torch.tensor(response.logprobs)).abs().max() < TOLERANCE
        stale = logprobs_of(before, prompts[response.request_id], response.token_ids)[count:]
        assert (stale - torch.tensor(response.logprobs)[count:]).abs().max() > 100 * TOLERANCE


@pytest.mark.parametrize("trainer", ["qwen3"], indirect=True)
def test_a_killed_engine_takes_up_where_it_stopped(trainer: Any, caplog: pytest.LogCaptureFixture) -> None:
    trainer.change_weights()
    trainer.engine.sync(3)
    requests = trainer.requests(24, max_new_tokens=16)
    requests += [replace(r, request_id=f"long-{r.request_id}", max_new_tokens=200) for r in requests]
    undisturbed = by_id(list(generate(trainer.engine, requests, PLAIN)))
    pid = trainer.engine.health().pid
    assert psutil.Process(pid).nice() == psutil.Process().nice()  # Ray puts its workers at 15 by itself
    responses = []
    with caplog.at_level(logging.WARNING, logger="megarl"):
        for response in generate(trainer.engine, requests, PLAIN):
            if not responses:
                os.kill(pid, signal.SIGKILL)
            responses.append(response)
    assert len(responses) == len(requests)
    assert {i: (r.token_ids.tolist(), r.policy_version) for i, r in by_id(responses).items()} == {
        i: (r.token_ids.tolist(), 3) for i, r in undisturbed.items()
    }
    assert trainer.logprob_error(requests, responses, 1.0) < TOLERANCE
    assert trainer.engine.health().pid != pid
    assert [r.getMessage() for r in caplog.records if f"pid {pid}" in r.getMessage()]


@pytest.mark.parametrize("trainer", ["qwen3"], indirect=True)
def test_the_third_death_in_a_row_is_an_error(trainer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class Dying:
        """An actor that starts and dies at once, as one does that is out of memory."""

        def __init__(self, settings: object, log_path: str) -> None:
            self._log_path = log_path

        def wait_started(self) -> None:
            with open(self._log_path, "a") as log:
                log.write("the last words\n")
            os._exit(1)

        def progress(self) -> tuple[int, int]:  # asked where starting takes long, on a busy machine
            return 0, 0

        def sync(self, policy_version: int) -> None: ...

    with monkeypatch.context() as patched:
        patched.setattr(vllm_engine, "VllmEngineActor", Dying)
        engine = VllmEngine(trainer.engine._settings, trainer.engine.log_path.with_name("dying.log"))
        with pytest.raises(EngineError, match=r"died while starting[\s\S]*the last words"):
            engine.wait_ready()
        with pytest.raises(EngineError, match=r"died while starting, 3 times in a row[\s\S]*the last words"):
            engine.sync(0)
