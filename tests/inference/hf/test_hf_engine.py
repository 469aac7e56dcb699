"""The engine in its process: weights, death, pause, sleep, and the protocol that vLLM's keeps too."""

from __future__ import annotations

import logging
import os
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from megarl.config.rollout import EngineConfig
from megarl.inference.backends import engine_class
from megarl.inference.interface import GeneratedResponse, GenerateRequest, WeightPlanError
from megarl.loops.engine_setup import attach_weights
from megarl.models import load_architecture
from megarl.records import token_ids
from megarl.weights.checksum import region_checksum
from megarl.weights.file_owner import FileOwner
from tests.inference.driving import generate
from tests.inference.hf.models import MAX_MODEL_LEN, PLAIN, make_model, make_requests
from tests.inference.mini_trainer import check_pause, logprobs_of

TOLERANCE = 1e-4


def by_id(responses: list[GeneratedResponse]) -> dict[str, list[int]]:
    return {response.request_id: response.token_ids.tolist() for response in responses}


def test_the_engine_reads_the_owners_memory(trainer: Any) -> None:
    [report] = trainer.engine.attach([trainer.weights.alias_plan()])
    assert set(report.aliased) == set(trainer.params) and report.copied == []
    assert report.aliased_bytes == trainer.weights.buffer.nbytes and report.note == ""
    requests = make_requests(6)
    before = list(generate(trainer.engine, requests, PLAIN))
    assert trainer.logprob_error(requests, before) < TOLERANCE
    trainer.change_weights()
    assert trainer.engine.sync(1).bytes_moved == 0
    after = list(generate(trainer.engine, requests, PLAIN))
    assert trainer.logprob_error(requests, before) > 0.1
    assert trainer.logprob_error(requests, after) < TOLERANCE
    assert {r.policy_version for r in before} == {0} and {r.policy_version for r in after} == {1}
    assert all(r.token_ids.flags.owndata for r in after), "no view of Ray's object store"


def test_copies_are_made_at_a_sync_and_not_before(trainer: Any) -> None:
    shared = type(trainer.weights)(trainer.params, "float32")
    shared.load(trainer.model)
    [report] = trainer.engine.attach([shared.copy_plan()])
    sync = trainer.engine.sync(7)
    assert report.aliased == [] and set(report.copied) == set(trainer.params)
    assert sync.bytes_moved == report.copied_bytes == shared.buffer.nbytes
    requests = make_requests(4)
    responses = list(generate(trainer.engine, requests, PLAIN))
    assert trainer.logprob_error(requests, responses) < TOLERANCE
    shared.buffer.zero_()
    assert by_id(list(generate(trainer.engine, requests, PLAIN))) == by_id(responses)


def test_ten_syncs_leave_the_engine_with_the_trainers_bits(trainer: Any) -> None:
    trainer.engine.attach([trainer.weights.copy_plan()])
    for version in range(10):
        trainer.change_weights()
        trainer.engine.sync(version)
        [sums] = trainer.engine.checksums()
        assert {s.param: s.value for s in sums} == {
            name: region_checksum(view) for name, view in trainer.weights.views.items()
        }


def test_a_wrong_plan_is_refused_with_every_violation(trainer: Any) -> None:
    plan = trainer.weights.alias_plan()
    with pytest.raises(WeightPlanError) as caught:
        trainer.engine.attach([replace(plan, aliases=plan.aliases[1:])])
    assert caught.value.violations == ["model.embed_tokens.weight: 0 of 16000 elements are covered"]
    with pytest.raises(WeightPlanError, match="2 plans for 1 engine rank"):
        trainer.engine.attach([plan, plan])
    requests = make_requests(2)  # the plan before them still holds
    assert trainer.logprob_error(requests, list(generate(trainer.engine, requests, PLAIN))) < TOLERANCE


def test_a_paused_engine_waits_and_takes_weights(trainer: Any) -> None:
    check_pause(trainer, make_requests(3), PLAIN, TOLERANCE)


def test_a_sleeping_engine_gives_its_cache_back(trainer: Any) -> None:
    requests = [replace(request, max_new_tokens=100) for request in make_requests(64)]
    before = by_id(list(generate(trainer.engine, requests, PLAIN)))
    process = psutil.Process(trainer.engine.health().pid)
    held = process.memory_full_info().uss
    trainer.engine.sleep()
    # 64 requests of 130 tokens or so, 128 numbers of 4 bytes each in 2 layers
    assert held - process.memory_full_info().uss > 4 * 2**20
    trainer.engine.wake()
    assert by_id(list(generate(trainer.engine, requests, PLAIN))) == before


def test_an_abort_and_a_consumer_that_leaves_end_requests(trainer: Any) -> None:
    requests = [replace(request, max_new_tokens=150) for request in make_requests(4)]
    whole = by_id(list(generate(trainer.engine, requests, PLAIN)))
    short = replace(requests[0], request_id="short", max_new_tokens=20)
    responses = []
    for response in generate(trainer.engine, [*requests, short], PLAIN):
        responses.append(response)
        if response.request_id == "short":
            trainer.engine.abort(["r1", "r2", "unknown"])
    ended = {response.request_id: response for response in responses}
    assert [ended[f"r{i}"].finish_reason for i in range(4)] == ["length", "abort", "abort", "length"]
    for name in ("r1", "r2"):
        count = len(ended[name].token_ids)
        assert 19 <= count < 150 and ended[name].token_ids.tolist() == whole[name][:count]
    leaving = generate(trainer.engine, [GenerateRequest("a", token_ids([1]), 3, 1), requests[1]], PLAIN)
    assert next(leaving).request_id == "a"
    leaving.close()
    deadline = time.monotonic() + 10
    while trainer.engine.health().num_unfinished_requests and time.monotonic() < deadline:
        time.sleep(0.05)
    assert trainer.engine.health().num_unfinished_requests == 0


def test_a_killed_engine_takes_up_where_it_stopped(trainer: Any, caplog: pytest.LogCaptureFixture) -> None:
    trainer.change_weights()
    trainer.engine.sync(3)
    requests = [replace(request, max_new_tokens=10 + 5 * i) for i, request in enumerate(make_requests(24))]
    undisturbed = by_id(list(generate(trainer.engine, requests, PLAIN)))
    pid = trainer.engine.health().pid
    responses = []
    with caplog.at_level(logging.WARNING, logger="megarl"):
        for response in generate(trainer.engine, requests, PLAIN):
            if not responses:
                os.kill(pid, signal.SIGKILL)
            responses.append(response)
    assert by_id(responses) == undisturbed and len(responses) == len(requests)
    assert {r.policy_version for r in responses} == {3}
    assert trainer.logprob_error(requests, responses) < TOLERANCE
    assert trainer.engine.health().pid != pid
    assert any("The Hugging Face engine died" in r.getMessage() for r in caplog.records)


def test_a_family_without_a_table_gets_its_weights_from_its_files(tmp_path: Path) -> None:
    """As `megarl eval` does it: by the names that the files and transformers have."""
    model = make_model("olmo2")
    model.save_pretrained(tmp_path)
    config = EngineConfig(backend="hf", kv_cache_gib=0.05, num_threads=1)
    options = {"dtype": "float32", "max_model_len": MAX_MODEL_LEN, "seed": 1, "log_dir": tmp_path}
    engine = engine_class("hf").start(tmp_path, config, **options)
    files = FileOwner(tmp_path, "float32")
    attach_weights(engine, load_architecture(tmp_path, any_family=True), [files.owner()])
    engine.sync(0)
    requests = make_requests(6)
    responses = {r.request_id: r for r in generate(engine, requests, PLAIN)}
    for request in requests:
        response = responses[request.request_id]
        expected = logprobs_of(model, request.prompt_ids, response.token_ids)
        assert (expected - torch.tensor(response.logprobs)).abs().max() < TOLERANCE
    engine.shutdown()
