"""The engine's core on models of many families: transformers' own forward pass is the reference."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from megarl.inference.hf.attention import NotPackable
from megarl.inference.hf.model import measure, why_not_paged
from megarl.inference.hf.packing_check import packing_error
from megarl.inference.hf.pages import PAGE
from megarl.inference.interface import GeneratedResponse, GenerateRequest, SamplingConfig
from megarl.ops import linear_token_logprob
from megarl.records import token_ids
from megarl.trainer.packed_attention import PackedRow
from megarl.trainer.torch import attention
from tests.inference.hf.models import FAMILIES, PLAIN, Core, make_requests
from tests.inference.mini_trainer import logprobs_of

TOLERANCE = 1e-4
ROWS_ONLY = ("mamba", "bloom", "lfm2")
PAGED = [family for family in FAMILIES if family not in ROWS_ONLY]


def assert_same(some: dict[str, GeneratedResponse], others: dict[str, GeneratedResponse]) -> None:
    """Equal tokens; logprobs may be rounded otherwise in another batch."""
    assert some.keys() == others.keys()
    for request_id, one in some.items():
        other = others[request_id]
        assert one.token_ids.tolist() == other.token_ids.tolist()
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=5e-5)


@pytest.mark.parametrize("family", PAGED)
def test_requests_in_one_pass_draw_what_they_draw_alone(family: str) -> None:
    core = Core(family)
    assert why_not_paged(core.model, 256) is None
    requests = make_requests(12)
    together = core.run(requests)
    assert core.logprob_error(requests, together) < TOLERANCE
    for request in requests[::4]:
        core.scheduler.forget()  # nothing is cached of the pass before
        assert_same(core.run([request]), {request.request_id: together[request.request_id]})


@pytest.mark.parametrize("family", [*ROWS_ONLY, "llama"])
def test_models_that_cannot_be_packed_are_computed_row_by_row(family: str) -> None:
    core = Core(family, paged=False)
    requests = make_requests(6, prompts=2)
    responses = core.run(requests)
    assert core.logprob_error(requests, responses) < TOLERANCE
    if family == "llama":
        assert_same(Core(family).run(requests), responses)


@pytest.mark.parametrize("family", ROWS_ONLY)
def test_why_a_model_cannot_be_packed_is_said(family: str) -> None:
    core = Core(family, paged=False)
    assert type(core.model).__name__ in (why_not_paged(core.model, 256) or "")
    if family != "lfm2":  # its attention can, its convolution mixes tokens beside it
        with pytest.raises(NotPackable):
            measure(core.model)


@pytest.mark.parametrize("family", ["llama", "gpt_oss", "gpt2"])
def test_packing_is_tried_with_the_weights_at_hand(family: str) -> None:
    core = Core(family)
    assert packing_error(core.model, core.runner) is None
    requests = make_requests(3)
    assert core.logprob_error(requests, core.run(requests)) < TOLERANCE, "the engine is as it was"


def test_a_model_that_mixes_its_neighbours_is_found_out() -> None:
    """As a convolution would that no configuration tells of."""
    core = Core()
    layer = core.model.model.layers[1].mlp
    forward = layer.forward
    layer.forward = lambda x: forward(x + 0.3 * torch.roll(x, 1, 1))
    assert "LlamaForCausalLM differ by" in (packing_error(core.model, core.runner) or "")


def test_greedy_is_what_generate_gives() -> None:
    core = Core("qwen3")
    requests = make_requests(5)
    responses = core.run(requests, replace(PLAIN, temperature=0.0))
    for request in requests:
        out = core.reference.generate(
            torch.tensor(request.prompt_ids[None]).long(),
            max_new_tokens=request.max_new_tokens,
            min_new_tokens=request.max_new_tokens,
            do_sample=False,
        )
        # min_new_tokens bars the end of sequence, which the engine takes for a token like any other.
        expected = out[0, len(request.prompt_ids) :].tolist()
        got = responses[request.request_id].token_ids.tolist()
        if 2 not in got:
            assert got == expected


@pytest.mark.parametrize("spread", [0.02, 0.2])
def test_engine_and_trainer_differ_by_rounding_alone(spread: float) -> None:
    """Equal to 1e-6 where fp32 can hold it: of an even distribution (spread 0.02, as models begin). With
    sharp ones either differs more from float64 than that, and neither more than the other."""
    core = Core("qwen3", sizes={"initializer_range": spread})
    requests = make_requests(24)
    responses = core.run(requests)
    engine = torch.cat([torch.from_numpy(responses[r.request_id].logprobs) for r in requests]).double()
    trainer = trainer_logprobs(core, requests, responses)
    core.reference.double()
    exact = torch.cat(
        [
            logprobs_of(core.reference, request.prompt_ids, responses[request.request_id].token_ids)
            for request in requests
        ]
    )
    assert exact.dtype == torch.float64
    if spread < 0.1:
        assert (engine - trainer).abs().max() < 1e-6
    floor = (trainer - exact).abs()
    assert (engine - exact).abs().max() < 3 * floor.max() and (engine - exact).abs().mean() < 2 * floor.mean()


@torch.no_grad()
def trainer_logprobs(
    core: Core, requests: list[GenerateRequest], responses: dict[str, GeneratedResponse]
) -> torch.Tensor:
    """Logprobs of all responses, end to end, as the torch backend computes them: one packed row."""
    whole = [np.concatenate([r.prompt_ids, responses[r.request_id].token_ids]) for r in requests]
    ids = torch.from_numpy(np.concatenate(whole)).long()
    positions = torch.cat([torch.arange(len(tokens)) for tokens in whole])
    core.reference.set_attn_implementation(attention.NAME)
    with attention.of_row(PackedRow([len(tokens) for tokens in whole])):
        hidden = core.reference.model(input_ids=ids[None], position_ids=positions[None], use_cache=False)[0][
            0
        ]
    core.reference.set_attn_implementation("eager")
    starts = np.cumsum([0, *(len(tokens) for tokens in whole)])
    rows = torch.cat(
        [
            torch.arange(start + len(request.prompt_ids) - 1, start + len(tokens) - 1)
            for start, request, tokens in zip(starts, requests, whole, strict=False)
        ]
    )
    head = core.reference.lm_head.weight
    return linear_token_logprob(hidden, head, ids[rows + 1], row_index=rows).logprob.double()


def test_a_slot_is_filled_again_at_once() -> None:
    core = Core(max_num_seqs=4)
    lengths = [50, 3, 4, 5, 6, 7, 8, 9]
    requests = [GenerateRequest(f"r{i}", token_ids([i + 1]), n, seed=i) for i, n in enumerate(lengths)]
    core.scheduler.add(requests, PLAIN)
    order, steps = [], 0
    while len(core.scheduler):
        order += [response.request_id for response in core.scheduler.step()]
        steps += 1
    assert steps == 50, "the longest alone takes that many"
    assert order[-1] == "r0"


def test_a_prompt_is_computed_once_for_its_samples() -> None:
    requests = [replace(r, max_new_tokens=5) for r in make_requests(8, prompts=1, length=1)]
    prompt = token_ids(np.arange(45) % 250)
    requests = [replace(request, prompt_ids=prompt) for request in requests]
    shared, apart = Core(), Core(share_prompts=False)
    ours, theirs = shared.run(requests), apart.run(requests)
    assert_same(ours, theirs)
    assert len({tuple(r.token_ids.tolist()) for r in ours.values()}) > 1
    assert shared.runner.tokens_computed == 45 + 8 * 4  # the last token drawn is never seen
    assert apart.runner.tokens_computed == 8 * (45 + 4)


def test_samples_that_start_later_find_the_prompts_whole_pages() -> None:
    prompt = token_ids(np.arange(2 * PAGE + 5) % 250)
    requests = [GenerateRequest(f"r{i}", prompt, 4, seed=i) for i in range(6)]
    core = Core(max_num_seqs=2)
    responses = core.run(requests)
    assert core.runner.tokens_computed == len(prompt) + 2 * 5 + 6 * 3
    assert core.logprob_error(requests, responses) < TOLERANCE


def test_the_next_turn_of_an_episode_continues_from_the_last() -> None:
    core = Core()
    first = GenerateRequest("one", token_ids(np.arange(3, 43)), 60, seed=1)
    response = core.run([first])["one"]
    longer = np.concatenate([first.prompt_ids, response.token_ids, token_ids([7, 8, 9])])
    second = GenerateRequest("two", longer, 10, seed=2)
    before = core.runner.tokens_computed
    responses = core.run([second])
    assert core.runner.tokens_computed - before == len(longer) - (99 // PAGE) * PAGE + 9
    assert core.logprob_error([second], responses) < TOLERANCE


def test_too_little_memory_delays_and_changes_nothing() -> None:
    requests = make_requests(12, prompts=6)
    roomy, tight = Core(), Core(pages=9)
    expected, got = roomy.run(requests), tight.run(requests)
    assert got.keys() == expected.keys()
    assert_same(got, expected)
    assert tight.runner.tokens_computed > roomy.runner.tokens_computed, "some were computed again"


def test_stop_tokens_end_a_response_and_stay() -> None:
    core = Core()
    requests = make_requests(6)
    free = core.run(requests)
    stop = int(free["r1"].token_ids[10])
    for request_id, response in core.run(requests, replace(PLAIN, stop_token_ids=(stop,))).items():
        expected = free[request_id].token_ids.tolist()
        ends = stop in expected
        assert response.token_ids.tolist() == (expected[: expected.index(stop) + 1] if ends else expected)
        assert response.finish_reason == ("stop" if ends else "length")


def test_nothing_is_drawn_past_max_model_len() -> None:
    response = Core().run([GenerateRequest("long", token_ids([5] * 250), 50, 1)])["long"]
    assert (len(response.token_ids), response.finish_reason) == (6, "length")


def test_requests_of_several_kinds_share_a_step() -> None:
    requests = make_requests(6)
    kinds = [PLAIN, replace(PLAIN, temperature=0.0), SamplingConfig(0.7, (), False, top_k=9, top_p=0.8)]
    core = Core()
    for number, kind in enumerate(kinds):
        core.scheduler.add(requests[number::3], kind)
    mixed = core.finish()
    for number, kind in enumerate(kinds):
        mine = requests[number::3]
        alone = Core().run(mine, kind)
        assert_same({request.request_id: mixed[request.request_id] for request in mine}, alone)
    assert len(mixed["r2"].logprobs) == 0


def test_an_abort_gives_back_what_there_was() -> None:
    core = Core(max_num_seqs=3)
    requests = [replace(request, max_new_tokens=40) for request in make_requests(5)]
    whole = core.run(requests)
    core.scheduler.add(requests, PLAIN)
    for _ in range(7):
        core.scheduler.step()
    aborted = {response.request_id: response for response in core.scheduler.abort(["r1", "r4", "unknown"])}
    assert {i: len(r.token_ids) for i, r in aborted.items()} == {"r1": 7, "r4": 0}
    assert aborted["r1"].token_ids.tolist() == whole["r1"].token_ids[:7].tolist()
    assert all(response.finish_reason == "abort" for response in aborted.values())
    rest = core.finish()
    assert {i: rest[i].token_ids.tolist() for i in rest} == {
        i: whole[i].token_ids.tolist() for i in ("r0", "r2", "r3")
    }


def test_new_weights_in_the_middle_count_from_the_next_token_on() -> None:
    core = Core("qwen3")
    requests = [replace(request, max_new_tokens=30) for request in make_requests(5)]
    core.scheduler.add(requests, PLAIN)
    for _ in range(11):
        core.scheduler.step()
    before = Core("qwen3").reference
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for param in core.reference.parameters():
            param.add_(0.05 * torch.randn(param.shape, generator=generator))
    core.copy_weights()
    core.scheduler.forget()
    core.scheduler.policy_version = 1
    responses = core.finish()
    for request in requests:
        response = responses[request.request_id]
        assert (response.policy_version, response.version_spans) == (0, [(0, 11), (1, 19)])
        both = [
            logprobs_of(model, request.prompt_ids, response.token_ids) for model in (before, core.reference)
        ]
        expected = torch.cat([both[0][:11], both[1][11:]])
        assert (expected - torch.from_numpy(response.logprobs)).abs().max() < TOLERANCE
        assert (both[0][11:] - torch.from_numpy(response.logprobs[11:])).abs().max() > 100 * TOLERANCE


def test_memory_that_was_given_back_is_taken_again() -> None:
    core = Core()
    requests = make_requests(4)
    before = core.run(requests)
    core.runner.sleep()
    assert core.runner._pages is None
    after = core.run(requests)
    assert_same(after, before)


def test_a_seed_that_is_not_given_is_drawn_once() -> None:
    requests = [GenerateRequest(f"r{i}", token_ids([4, 5]), 12, seed=None) for i in range(4)]
    core = Core()
    tokens = {tuple(response.token_ids.tolist()) for response in core.run(requests).values()}
    assert len(tokens) == 4
