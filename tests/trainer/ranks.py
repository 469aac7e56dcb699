"""Functions run by trainer ranks in tests; heavy imports are inside, so pytest itself needs no Megatron."""

from __future__ import annotations

import pickle
import random
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megarl.batching.rank_microbatches import PackedStep
from megarl.errors import UserError
from megarl.losses.base import LossResult, LossTokens, token_weights
from megarl.losses.policy import PolicyLoss
from megarl.losses.sft import sft_loss
from megarl.ops.policy_loss import PolicyLossOptions
from megarl.records import TokenSequence, TrainBatch
from megarl.trainer.passes import evaluate_loss, fill_logprobs, train_step

TOTAL_STEPS = 8
TEMPERATURE = 0.9
OPTIMIZER: dict[str, Any] = {
    "lr": 4e-3,
    "min_lr": 1e-3,
    "lr_schedule": "cosine",
    "lr_warmup_steps": 2,
    "weight_decay": 0.1,
    # Adam amplifies gradients that are pure rounding noise; this keeps them noise.
    "adam_eps": 1e-5,
}
KL_COEF = 0.3
POLICY_LOSS = PolicyLoss(PolicyLossOptions(clip_low=0.02, clip_high=0.05, kl="k3", kl_coef=KL_COEF))


def take_split_counts(metrics: dict[str, float]) -> list[float]:
    """Remove and return the numbers of split and whole sequences; empty without context_split_from."""
    return [metrics.pop(k) for k in ("num_split_sequences", "num_whole_sequences") if k in metrics]


def make_sequences(seed: int, count: int = 9, longest: int = 40, vocab: int = 250) -> list[TokenSequence]:
    """Random sequences with rollout logprobs; the second has no target at all."""
    draw = random.Random(seed)
    sequences = []
    for number in range(count):
        n = draw.randint(6, longest)
        prompt = draw.randint(1, 4)
        mask = [0] * n if number == 1 else [0] * prompt + [draw.randint(0, 9) > 0 for _ in range(n - prompt)]
        token_ids = [draw.randrange(vocab) for _ in range(n)]
        draw.gauss(0, 1)  # what follows is drawn as ever: near ties of sampling would fall elsewhere
        logprobs = [draw.uniform(-8, -3) for _ in range(n)]
        sequences.append(TokenSequence(np.array(token_ids), np.array(mask), np.array(logprobs)))
    return sequences


def prepare(
    policy: Any, sequences: Iterable[TokenSequence], aggregation: Any = "token", **options: Any
) -> PackedStep:
    """One optimizer step of these sequences, with advantages that follow from their tokens."""
    batch = TrainBatch.of(sequences)
    step: PackedStep = policy.prepare(batch, aggregation, advantages=advantages_of(batch), **options)
    return step


def advantages_of(sequences: Iterable[TokenSequence]) -> np.ndarray:
    """[S]: each sequence's is drawn from its tokens."""
    return np.array([random.Random(int(each.token_ids.sum())).gauss(0, 1) for each in sequences])


def build(
    context: Any,
    model_dir: str,
    *,
    optimizer: dict[str, Any] | None = None,
    budget: int = 96,
    dtype: Any = "float32",
    lora: Any = None,
) -> Any:
    """A policy on this rank, with adapters if ``lora`` is their configuration."""
    from megarl.config.model import ModelConfig
    from megarl.config.optimizer import OptimizerConfig
    from megarl.config.packing import PackingConfig
    from megarl.models import load_architecture
    from megarl.trainer.megatron.trainer import MegatronTrainer

    return MegatronTrainer(
        context,
        load_architecture(model_dir),
        ModelConfig(path=model_dir, dtype=dtype),
        PackingConfig(max_tokens_per_microbatch=budget),
        OptimizerConfig(**(OPTIMIZER | (optimizer or {}))),
        TOTAL_STEPS,
        lora=lora,
    )


def types_and_weights(context: Any, model_dir: str, dtype: str) -> Any:
    """Types of the parameters, and the weights by HF name in float32."""
    policy = build(context, model_dir, dtype=dtype)
    types = {str(param.dtype) for param in policy.params.values()}
    return types, {name: tensor.float().numpy() for name, tensor in policy.weights.hf_tensors()}


def export(policy: Any, model_dir: str, directory: str) -> None:
    from megarl.weights.hf import export_hf

    tensors = policy.weights.hf_tensors()
    if policy.context.is_first:
        export_hf(directory, model_dir, policy.architecture, tensors)
    else:
        assert list(tensors) == []


_offered: list[Any] = []  # policies whose memory an engine may be reading


def train_export_and_offer(
    context: Any, model_dir: str, export_dir: str, distributed: bool, transport: Any = "auto"
) -> Any:
    """Take one training step, export the weights, and return rank 0's owners; the weights stay alive."""
    policy = build(context, model_dir, optimizer={"distributed": distributed, "lr_warmup_steps": 0})
    train_step(policy, prepare(policy, make_sequences(5), "token").batches, sft_loss, temperature=1.0)
    export(policy, model_dir, export_dir)
    owners = policy.weights.owners(transport)
    _offered[:] = [policy]
    return owners


def train_and_wait(context: Any, model_dir: str, directory: str, steps: int, distributed: bool) -> None:
    """Train ``steps`` steps; after each, wait for the engine's checksums and answer which regions differ.

    Messages are files in ``directory``: owners, attached, then for each step trained-N from rank 0,
    checksums-N from the engine's side, wrong-N-RANK from every rank. The last step's weights are exported.
    """
    place = Path(directory)
    policy = build(context, model_dir, optimizer={"distributed": distributed, "lr_warmup_steps": 0})
    owners = policy.weights.owners()
    if context.is_first:
        put(place / "owners", owners)
    take(place / "attached")
    for step in range(1, steps + 1):
        train_step(policy, prepare(policy, make_sequences(step), "token").batches, sft_loss, temperature=1.0)
        if step == steps:
            export(policy, model_dir, str(place / "last"))
        if context.is_first:
            put(place / f"trained-{step}", None)
        regions = take(place / f"checksums-{step}")
        mine = policy.weights.checksums([query for query, _ in regions])
        put(
            place / f"wrong-{step}-{context.rank}", [n for n, value in mine.items() if value != regions[n][1]]
        )


def put(path: Path, value: Any) -> None:
    """Write a message; it is there as a whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(pickle.dumps(value))
    partial.rename(path)


def take(path: Path) -> Any:
    """Wait for a message."""
    for _ in range(2400):
        if path.exists():
            return pickle.loads(path.read_bytes())
        time.sleep(0.05)
    raise TimeoutError(path)


def checksums(context: Any, queries: list[Any]) -> dict[int, int]:
    """Return checksums of the offered policy's regions."""
    [policy] = _offered
    return policy.weights.checksums(queries)


def disturb(context: Any, param: str) -> None:
    """Change one element of a parameter of the offered policy."""
    [policy] = _offered
    with torch.no_grad():
        policy.params[param].view(-1)[3] += 1.0


def wrong_checksums(context: Any, regions: list[tuple[Any, int]]) -> list[int]:
    """Return the indices of regions in the offered policy's memory whose checksum is wrong."""
    [policy] = _offered
    mine = policy.weights.checksums([query for query, _ in regions])
    return [number for number, value in mine.items() if value != regions[number][1]]


def weights(policy: Any) -> dict[str, np.ndarray]:
    """All Hugging Face tensors, on rank 0."""
    return {name: tensor.float().numpy().copy() for name, tensor in policy.weights.hf_tensors()}


# --- one rank -----------------------------------------------------------------------------------------


def logits_and_export(
    context: Any, model_dir: str, sequences: list[list[int]], export_dir: str, dtype: str
) -> np.ndarray | None:
    """Logits [T, V] of sequences packed into one microbatch (fp32 only), and the model written back."""
    from megarl.config.model import ModelConfig
    from megarl.models import load_architecture
    from megarl.trainer.megatron.attention import PackedMicrobatch
    from megarl.trainer.megatron.trainer import MegatronTrainer

    policy = MegatronTrainer(context, load_architecture(model_dir), ModelConfig(path=model_dir, dtype=dtype))
    export(policy, model_dir, export_dir)
    if dtype != "float32":
        return None
    lengths = [len(s) for s in sequences]
    packed = PackedMicrobatch(
        qkv_format="thd", lengths=lengths, position_ids=torch.cat([torch.arange(n) for n in lengths])
    )
    ids = torch.tensor([token for s in sequences for token in s])
    with torch.no_grad():
        hidden = policy.chunks[0](ids[None], packed.position_ids[None], None, packed_seq_params=packed)
        return (hidden[:, 0] @ policy.chunks[0].head_weight().T).numpy()


def gradients(
    context: Any,
    model_dir: str,
    sequences: list[TokenSequence],
    aggregation: Any,
    loss: Any,
    splits: list[list[list[int]] | None],
) -> list[tuple[float, dict[str, np.ndarray]]]:
    """Loss and gradient (by HF name) for each split of the step into microbatches; None is the planner's."""
    from megarl.batching.pack import Packer
    from megarl.weights.hf import region_index

    policy = build(context, model_dir)
    batch_of_all = TrainBatch.of(sequences)
    share = torch.from_numpy(token_weights(batch_of_all.num_targets(), aggregation)).float()
    answers = []
    for split in splits:
        if split is None:
            batches = prepare(policy, sequences, aggregation).batches
            assert len(batches) > 1
        else:
            packer = Packer(batch_of_all, advantages=advantages_of(batch_of_all))
            batches = [packer.pack(indices) for indices in split]
            for batch in batches:
                batch.loss_weights = share[batch.sequence_ids] * batch.loss_mask
        policy.ddp[0].zero_grad_buffer()
        results = policy.run(batches, lambda output: loss(output.logprobs()), grad=True)
        grads = {n: torch.zeros(shape) for n, shape in policy.architecture.hf_shapes().items()}
        for region in policy.regions:
            box = tuple(slice(*span) for span in region.box)
            grads[region.hf][box] = policy.params[region.param].main_grad[region_index(region.index)]
        total = sum(float(result.loss) for result in results)
        answers.append((total, {name: grad.numpy() for name, grad in grads.items()}))
    return answers


def sft_steps(
    context: Any, model_dir: str, steps: list[list[TokenSequence]], optimizer: dict[str, Any]
) -> tuple[list[dict[str, float]], dict[str, np.ndarray]]:
    """Metrics of plain SFT steps and the weights after them."""
    policy = build(context, model_dir, optimizer=optimizer)
    metrics = [
        train_step(policy, prepare(policy, s, "token").batches, sft_loss, temperature=1.0).metrics
        for s in steps
    ]
    return metrics, weights(policy)


def first_policy_step(context: Any, model_dir: str) -> dict[str, float]:
    """One optimizer step right after the rollout: old logprobs are these very logprobs."""
    policy = build(context, model_dir)
    loss = PolicyLoss(PolicyLossOptions())
    batches = prepare(policy, make_sequences(5), "token").batches
    return dict(train_step(policy, batches, loss, temperature=TEMPERATURE).metrics)


def reference_exchange(context: Any, model_dir: str, distributed: bool) -> dict[str, Any]:
    """Train with a reference pass before every step, and say what moved."""
    policy = build(context, model_dir, optimizer={"distributed": distributed, "lr_warmup_steps": 0})
    sequences = make_sequences(5)

    def logprobs() -> np.ndarray:
        batches = prepare(policy, sequences, "token").batches
        fill_logprobs(policy, batches, "ref_logprobs", temperature=1.0)
        return torch.cat([b.ref_logprobs for b in batches]).numpy()

    def addresses() -> dict[str, int]:
        return {name: param.data_ptr() for name, param in policy.params.items()}

    policy.keep_reference()
    facts: dict[str, Any] = {"start": logprobs(), "own": [], "reference": [], "again": [], "stayed": []}
    before = addresses()
    kept = {name: tensor.data_ptr() for name, tensor in policy._reference.items()}
    metrics = []
    for _ in range(2):
        batches = prepare(policy, sequences, "token").batches
        metrics.append(train_step(policy, batches, sft_loss, temperature=1.0).metrics)
        values = {name: param.detach().clone() for name, param in policy.params.items()}
        facts["own"].append(logprobs())
        with policy.reference():
            inside = addresses()
            facts["reference"].append(logprobs())
        facts["again"].append(logprobs())
        facts["stayed"].append(
            inside == kept
            and addresses() == before
            and kept == {name: tensor.data_ptr() for name, tensor in policy._reference.items()}
            and all(torch.equal(values[name], param) for name, param in policy.params.items())
        )
    undisturbed = build(context, model_dir, optimizer={"distributed": distributed, "lr_warmup_steps": 0})
    facts["equal_metrics"] = metrics == [
        train_step(
            undisturbed, prepare(undisturbed, sequences, "token").batches, sft_loss, temperature=1.0
        ).metrics
        for _ in range(2)
    ]
    try:
        with policy.reference():
            raise KeyboardInterrupt
    except KeyboardInterrupt:
        facts["restored_after_error"] = addresses() == before
    return facts


def memory_parts(context: Any, model_dir: str, backend: str, dtype: str, distributed: bool) -> Any:
    """What a trainer says it holds: before a step, after it with a reference, and with gradients asleep."""
    from megarl.config.model import ModelConfig
    from megarl.config.optimizer import OptimizerConfig
    from megarl.config.packing import PackingConfig
    from megarl.config.trainer import TrainerConfig
    from megarl.models import load_architecture
    from megarl.trainer.build import trainer_class

    context = replace(context, trainer=TrainerConfig(backend=backend))
    policy = trainer_class(context)(
        context,
        load_architecture(model_dir),
        ModelConfig(path=model_dir, dtype=dtype),
        PackingConfig(max_tokens_per_microbatch=96),
        OptimizerConfig(**OPTIMIZER, distributed=distributed),
        TOTAL_STEPS,
    )
    before = policy.memory_bytes()
    policy.keep_reference()
    train_step(policy, prepare(policy, make_sequences(5), "token").batches, sft_loss, temperature=1.0)
    after = policy.memory_bytes()
    policy.sleep(["gradients"])
    return before, after, policy.memory_bytes()


def load_error(context: Any, model_dir: str, directory: str) -> str:
    """Return the error message for a checkpoint that cannot be loaded."""
    try:
        build(context, model_dir).load(Path(directory))
    except UserError as error:
        return str(error)
    return ""


# --- any layout ---------------------------------------------------------------------------------------


def train(
    context: Any,
    model_dir: str,
    steps: list[int],
    load: str | None = None,
    save: dict[int, str] | None = None,
    distributed: bool = False,
    dtype: str = "float32",
) -> dict[str, Any]:
    """Steps of four kinds (see _step), from ``model_dir`` or a checkpoint; ``save``: step -> directory."""
    from megatron.core import parallel_state as mpu

    policy = build(context, model_dir, optimizer={"distributed": distributed}, dtype=dtype)
    policy.keep_reference()
    if load:
        policy.load(Path(load))
    started_with = weights(policy)
    log: list[dict[str, float]] = []
    for number in steps:
        log += _step(policy, number)
        if save and number in save:
            policy.save(Path(save[number]), optimizer=True)
    at = context.at
    return {
        "log": log,
        "started_with": started_with,
        "weights": weights(policy),
        "random": [random.random(), float(np.random.rand()), float(torch.rand(()))],
        "coordinates": (at.tensor, at.pipeline, at.context, at.data),
        "megatron_coordinates": (
            mpu.get_tensor_model_parallel_rank(),
            mpu.get_pipeline_model_parallel_rank(),
            mpu.get_context_parallel_rank(),
            mpu.get_data_parallel_rank(),
        ),
    }


def _step(policy: Any, number: int) -> list[dict[str, float]]:
    """SFT by tokens (validated first), SFT by sequences, two policy steps on one batch, one lone sequence."""
    kind = number % 4
    sequences = make_sequences(number)
    if kind % 2 == 0:  # these steps depend on every random state a rank has
        draws = random.random(), float(np.random.rand()), float(torch.rand(()))
        sequences[0].token_ids[-1] = int(sum(draws) * 80)

    def step(packed: PackedStep, loss: Any) -> dict[str, float]:
        result = train_step(policy, packed.batches, loss, temperature=TEMPERATURE)
        return result.metrics | packed.split_counts | _flat("train", result.mismatch)

    if kind == 0:
        packed = prepare(policy, sequences, "token")
        validation = evaluate_loss(policy, packed.batches, sft_loss)
        return [{f"validation_{k}": v for k, v in validation.items()} | step(packed, sft_loss)]
    if kind == 1:
        return [step(prepare(policy, sequences, "sequence"), sft_loss)]
    if kind == 3:
        return [step(prepare(policy, sequences[:1], "token"), sft_loss)]
    packed = prepare(policy, sequences, "token")
    filled = _flat("old", fill_logprobs(policy, packed.batches, "old_logprobs", temperature=TEMPERATURE))
    with policy.reference():
        filled |= _flat("ref", fill_logprobs(policy, packed.batches, "ref_logprobs", temperature=TEMPERATURE))
    return [filled | step(packed, POLICY_LOSS), step(packed, POLICY_LOSS)]


def _flat(prefix: str, mismatch: Any) -> dict[str, float]:
    worst = mismatch.worst
    values = mismatch.metrics() | {
        "num_tokens": mismatch.num_tokens,
        "worst_sequence": worst.sequence_id,
        "worst_label": worst.label,
        "worst_trainer_logprob": worst.trainer_logprob,
        "worst_rollout_logprob": worst.rollout_logprob,
    }
    return {f"{prefix}_{name}": float(value) for name, value in values.items()}


def advantage_loss(tokens: LossTokens) -> LossResult:
    """On-policy policy gradient, as PolicyLoss without old logprobs."""
    return PolicyLoss(PolicyLossOptions())(tokens)


def train_with_naps(context: Any, model_dir: str, distributed: bool, parts: list[str]) -> dict[str, Any]:
    """Take three steps with ``parts`` asleep in between; return the bytes of gradients meanwhile."""
    policy = build(context, model_dir, optimizer={"distributed": distributed})
    gradient_bytes = []
    for seed in range(3):
        train_step(policy, prepare(policy, make_sequences(seed), "token").batches, sft_loss, temperature=1.0)
        policy.sleep(parts)
        buffers = [buffer for chunk in policy.ddp for buffer in chunk.buffers]
        gradient_bytes += [buffer.grad_data.untyped_storage().nbytes() for buffer in buffers]
    return {"gradient_bytes": gradient_bytes, "weights": weights(policy)}


def make_groups(seed: int, num_groups: int = 4, size: int = 4, vocab: int = 250) -> list[TokenSequence]:
    """Groups of sequences with a shared prompt; the last group's sequences have none."""
    draw = random.Random(seed)
    sequences = []
    for group in range(num_groups):
        prompt = [draw.randrange(vocab) for _ in range(draw.randint(5, 24))]
        for _ in range(size):
            if group == num_groups - 1:
                prompt = [draw.randrange(vocab) for _ in range(6)]
            response = [draw.randrange(vocab) for _ in range(draw.randint(1, 14))]
            draw.gauss(0, 1)
            sequences.append(
                TokenSequence(
                    token_ids=np.array(prompt + response),
                    loss_mask=np.array([0] * len(prompt) + [1] * len(response)),
                    rollout_logprobs=np.array([0.0] * len(prompt) + [draw.uniform(-8, -3) for _ in response]),
                    num_prompt_tokens=len(prompt),
                )
            )
    return sequences


def train_groups(
    context: Any, model_dir: str, share_prefix: str, budget: int, loss: PolicyLoss
) -> dict[str, Any]:
    """Three steps with old and reference logprobs, and the first step's gradients."""
    policy = build(context, model_dir, optimizer={"lr_warmup_steps": 0}, budget=budget)
    maker = policy.batch_maker
    maker.packing = maker.packing.model_copy(update={"share_prefix": share_prefix})
    policy.keep_reference()
    log, computed, gradients = [], 0, {}
    for seed in range(3):
        packed = prepare(policy, make_groups(seed), "sequence")
        batches = packed.batches
        computed += packed.num_computed_tokens
        fill_logprobs(policy, batches, "old_logprobs", temperature=TEMPERATURE)
        with policy.reference():
            fill_logprobs(policy, batches, "ref_logprobs", temperature=TEMPERATURE)
        result = train_step(policy, batches, loss, temperature=TEMPERATURE)
        log.append(
            result.metrics
            | packed.split_counts
            | {"worst": result.mismatch.metrics()["logprob_abs_diff_max"]}
        )
        if seed == 0:
            gradients = {name: param.main_grad.numpy().copy() for name, param in policy.params.items()}
    return {"log": log, "computed": computed, "weights": weights(policy), "gradients": gradients}


def train_while_saving(
    context: Any, model_dir: str, directory: str, distributed: bool, dtype: str
) -> dict[str, Any]:
    """Save after step 1 in the background; the files are written only after step 3."""
    import threading
    from unittest.mock import patch

    from megarl.trainer.checkpoint_files import RankFiles

    policy = build(context, model_dir, optimizer={"distributed": distributed}, dtype=dtype)
    policy.keep_reference()
    _step(policy, 0)
    _step(policy, 1)
    trained, original = threading.Event(), RankFiles.write

    def write_later(files: Any) -> Any:
        trained.wait()
        return original(files)

    with patch.object(RankFiles, "write", write_later):
        pending = policy.start_save(Path(directory), optimizer=True)
        log = _step(policy, 3) + _step(policy, 5)
        done_before = pending.done()
        trained.set()
        pending.finish()
    return {"log": log, "weights": weights(policy), "done_before": done_before, "done": pending.done()}


def train_in_buckets(context: Any, model_dir: str, *args: Any) -> dict[str, Any]:
    """:func:`train` with the distributed optimizer, in gradient buffers of several buckets with padding."""
    from functools import partial
    from unittest.mock import patch

    from megarl.trainer.megatron import optimizer

    small = partial(optimizer.DistributedDataParallelConfig, bucket_size=5000)
    with patch.object(optimizer, "DistributedDataParallelConfig", small):
        return train(context, model_dir, *args, True)


def save_twice(
    context: Any, model_dir: str, ours: str, megatrons: str, distributed: bool
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Two steps, then checkpoints by MegaRL's writer and by Megatron's own; all tensors of both."""
    from megatron.core import dist_checkpointing

    from megarl.trainer import random_state
    from megarl.trainer.megatron import checkpoint
    from tests.convert.stock import may_have_children

    policy = build(context, model_dir, optimizer={"distributed": distributed})
    policy.keep_reference()
    _step(policy, 0)
    _step(policy, 1)
    policy.save(Path(ours), optimizer=True)
    state = checkpoint._sharded_state(policy.chunks, policy.optimizer, is_loading=False)
    state["schedule"] = policy.schedule.state_dict()
    with may_have_children():
        dist_checkpointing.save(state, megatrons)
    torch.save(checkpoint._rng_state(), random_state.file(Path(megatrons), context.rank))
    one, two = (
        {name: t.float().numpy() for name, t in state.items() if isinstance(t, torch.Tensor)}
        for state in map(dist_checkpointing.load_plain_tensors, (ours, megatrons))
    )
    return one, two


def random_states(context: Any) -> dict[str, Any]:
    """A GPU's random states taken and given back, on both devices; a tensor stands for its generator."""
    from dataclasses import replace
    from unittest.mock import patch

    from megarl import platform
    from megarl.trainer.megatron import checkpoint

    generator, facts = torch.tensor([1, 2], dtype=torch.uint8), {}
    with (
        patch.object(platform, "_installed", replace(platform.current(), name="cuda")),
        patch("torch.cuda.get_rng_state", generator.clone),
        patch("torch.cuda.set_rng_state", generator.copy_),
    ):
        of_cpu = {name: part for name, part in checkpoint._rng_state().items() if name != "cuda"}
        of_gpu = checkpoint._rng_state()
        generator += 5  # something is drawn
        facts["cpu to gpu"] = checkpoint._set_rng_state(of_cpu), generator.tolist()
        facts["gpu to gpu"] = checkpoint._set_rng_state(of_gpu), generator.tolist()
    before = torch.get_rng_state()
    torch.rand(3)
    drawn = torch.get_rng_state()
    facts["gpu to cpu"] = checkpoint._set_rng_state(of_gpu), torch.equal(drawn, torch.get_rng_state())
    facts["cpu to cpu"] = checkpoint._set_rng_state(of_cpu), torch.equal(before, torch.get_rng_state())
    return facts


def unwritable(context: Any, model_dir: str, directory: str) -> str:
    """Return the error message of a background save that cannot write its files."""
    policy = build(context, model_dir)
    pending = policy.start_save(Path(directory), optimizer=True)
    try:
        pending.finish()
    except UserError as error:
        return str(error)
    return ""


def train_and_watch_sends(context: Any, model_dir: str) -> tuple[list[float], int]:
    """Losses of two steps, and how many of the pipeline's messages lost their memory under way."""
    from unittest.mock import patch

    import torch.distributed as dist
    from megatron.core.pipeline_parallel import p2p_communication

    send, make_ops, lost = dist.isend, p2p_communication._p2p_ops, []

    class Watched:
        def __init__(self, work: Any, tensor: torch.Tensor) -> None:
            self._work, self._tensor, self._memory = work, tensor, tensor.data_ptr()

        def wait(self) -> None:
            lost.append(self._tensor.data_ptr() != self._memory)
            self._work.wait()

    def watch(tensor: torch.Tensor, dst: int, group: Any) -> Watched:
        return Watched(send(tensor, dst=dst, group=group), tensor)

    def ops(**arguments: Any) -> Any:
        with patch("torch.distributed.isend", watch):  # here only: batches of messages compare the function
            return make_ops(**arguments)

    policy = build(context, model_dir)
    losses = []
    with patch.object(p2p_communication, "_p2p_ops", ops):
        for seed in range(2):
            batches = prepare(policy, make_sequences(seed), "token").batches
            losses.append(train_step(policy, batches, sft_loss, temperature=1.0).metrics["loss"])
    assert bool(lost) == (context.parallel.pipeline_parallel_size > 1)
    return losses, sum(lost)


def assert_same_gradients(expected: dict[str, np.ndarray], parts: list[dict[str, np.ndarray]]) -> None:
    """Every rank's part of every gradient (NaN elsewhere) equals one rank's; together they are all of it."""
    for key, grad in expected.items():
        bound = 1e-5 * max(np.abs(grad).max(), 1e-2)
        seen = np.zeros(grad.shape, dtype=bool)
        for part in parts:
            there = ~np.isnan(part[key])
            assert np.abs(part[key] - grad)[there].max(initial=0) < bound, key
            seen |= there
        assert seen.all(), key
