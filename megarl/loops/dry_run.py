"""`megarl JOB --dry-run`: read model, data and environment as the run would, and say what it will do.

Nothing is started or written. Lines appear as they are known, since reading the data may take a while.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import textwrap
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from megarl.config.hub import as_written
from megarl.config.model import is_checkpoint, read_model_config
from megarl.config.online import OnlineConfig
from megarl.config.section import Section
from megarl.config.training import TrainingRoot
from megarl.data.stream import beginning
from megarl.errors import UserError
from megarl.jobs import Job
from megarl.run_directory import RunDirectory
from megarl.terminal import one_line, printable, short_count, working

_WIDTH, _LABEL = 110, 15
_NUM_MEASURED = 1000  # examples whose lengths are averaged
_NUM_CHANGED = 24  # settings listed by name
_MAX_VALUE = 40  # characters of a setting's value
_ITEM = {"float32": 4, "bfloat16": 2}
GIB = 2**30


def dry_run(job: Job, config: Any, problems: Iterable[str]) -> None:
    """Print what ``megarl JOB`` would do with this configuration.

    Args:
        job: the command.
        config: its configuration, valid.
        problems: what this machine lacks for the run, a line each.

    Raises:
        UserError: what the run would refuse after its start: data, environments, the run directory.
    """
    _say("dry run", f"megarl {job.name}; nothing is started or written (--dry-run=full prints the settings)")
    _say("run", _state_of_run(config))
    path = config.model.path
    if is_checkpoint(path):
        _say("model", f"{path}: a checkpoint, converted to Hugging Face's format first")
        for line in problems:
            _say("machine", line)
        return
    with working("reading the model's files"):
        # These import torch and transformers.
        from megarl.loops.model_files import read_model
        from megarl.loops.try_environment import check_environments

        architecture, tokenizer, longest = read_model(config)
    count = sum(math.prod(shape) for shape in architecture.hf_shapes().values())
    trained = _trained(config, architecture) if job.trains else "not trained"
    sizes = f"{architecture.spec.family}, {short_count(count)} parameters, {config.model.dtype}"
    _say("model", f"{as_written(path)}: {sizes}; {trained}")
    for name in ("critic", "teacher"):
        if (other := getattr(config, name, None)) is not None:
            _say(name, as_written(other.path or path))
    load, data = job.data.loader(), {}
    for split in ("train", "held_out"):
        if getattr(config.data, split, None) is not None:
            with working(f"reading data.{split}"):
                data[split] = load(config, tokenizer, longest, split)
                described = _describe_data(job, getattr(config.data, split), data[split])
            _say(f"data.{split}", described)
            for report in data[split].reports:
                for line in report.lines():
                    _say("", line)
    if job.trains:
        if data["train"].stream is None:
            config = config.with_steps(len(data["train"]))
        for label, text in _steps(job, config, data["train"], longest):
            _say(label, text)
        for line in config.notes():
            _say("note", line)
    if hasattr(config, "rollout"):
        _say("evaluation", _evaluation(config))
        limit = config.rollout.environments.timeout_seconds
        for split in data:
            with working(f"trying the environment of data.{split}"):
                lines = list(
                    check_environments(getattr(config.data, split), f"data.{split}", data[split], limit)
                )
            for line in lines:
                _say("environment", line)
        _say("engine", _engine(config))
    if job.trains:
        _say("trainer", _layout(config))
        with working("planning the memory"):
            memory = _memory(config)
        _say("memory", memory)
        _say("disk", _disk(config, architecture, count))
    _say("not default", _changed(config))
    for line in problems:
        _say("machine", line)


def _say(label: str, text: str) -> None:
    lines = textwrap.wrap(printable(text), _WIDTH - _LABEL, break_long_words=False, break_on_hyphens=False)
    for number, line in enumerate(lines):
        print(f"{label if number == 0 else '':<{_LABEL}}{line}", flush=True)


# --- the run directory and the model -------------------------------------------------------------


def _state_of_run(config: Any) -> str:
    directory = RunDirectory(config.run.dir)
    if not isinstance(config, TrainingRoot):
        return f"{directory.path}"
    if is_checkpoint(config.model.path):
        from megarl.loops.start_weights import with_converted_path

        config = with_converted_path(config)  # as the run's own configuration has it
    if (line := directory.check_before_start(config)) is not None:
        return line
    latest = directory.latest_checkpoint()
    return f"{directory.path}: new" if latest is None else f"{directory.path}: resumes from {latest.name}"


def _trained(config: TrainingRoot, architecture: Any) -> str:
    if config.lora is None:
        return "all are trained"
    from megarl.loops.model_files import describe_lora

    return describe_lora(architecture, config.lora)


# --- data and steps ------------------------------------------------------------------------------


def _lengths(example: Any) -> list[int]:
    """Return the tokens of each sequence of an example."""
    from megarl.records import Pair, Prompt

    if isinstance(example, Pair):
        return [len(example.chosen), len(example.rejected)]
    return [len(example.token_ids if isinstance(example, Prompt) else example)]


def _describe_data(job: Job, source: Any, data: Any) -> str:
    streamed = "" if data.stream is None else f" in the first {source.streaming_window:,} rows"
    data = beginning(data)
    count = min(len(data), _NUM_MEASURED)
    lengths = [length for index in range(count) for length in _lengths(data[index])]
    of = "" if count == len(data) else f" (of the first {count:,})"
    what = "prompts of" if job.data.noun == "problems" else "sequences of"
    mean = sum(lengths) / len(lengths)
    return (
        f"{len(data):,} {job.data.noun}{streamed} of {_source(source)}; {what} {mean:.0f} tokens in the "
        f"mean, {max(lengths)} at most{of}"
    )


def _source(source: Any) -> str:
    if source.source == "mixture":
        return "a mixture of " + ", ".join(
            f"{name} ({_source(part)})" for name, part in source.sources.items()
        )
    names = ("task", "path", "dataset", "name", "benchmark")
    named = next((str(getattr(source, name)) for name in names if getattr(source, name, None)), "")
    return f"{source.source} {named}".strip()


def _steps(job: Job, config: TrainingRoot, train: Any, longest: int) -> Iterator[tuple[str, str]]:
    """Yield the lines on steps, tokens and microbatches, and on the optimizer."""
    steps, ranks = config.training.num_steps, config.parallel.data_parallel_size
    if isinstance(config, OnlineConfig):
        rollout = config.rollout
        examples, each = rollout.num_prompts_per_step, rollout.num_generations_per_prompt
        batch = f"{examples} prompts x {each} samples"
        bound = "at most "
    else:
        examples, each, bound = config.training.batch_size, 1, ""
        batch = f"{examples} {job.data.noun}"
    if train.stream is None:
        length = f"{steps * examples / len(train):.3g} epochs"
    else:
        length = f"{steps * examples:,} in all, of a stream of unknown length"
    updates = config.num_optimizer_steps
    yield "steps", f"{steps:,} steps of {batch}: {length}; {updates:,} optimizer steps"
    lengths = _first_step(config, train, examples, each, longest)
    counts, tokens = _microbatches(config, lengths)
    budget = config.packing.max_tokens_per_microbatch
    packed = f"{counts} microbatch{'es' if counts > 1 else ''} of {budget:,} tokens"
    where = f" on each of {ranks} data-parallel ranks" if ranks > 1 else ""
    step = "an optimizer step" if isinstance(config, OnlineConfig) else "the first step"
    yield (
        "tokens",
        f"{step} has {bound}{tokens:,} tokens, in {bound}{packed}{where}; longest sequence {longest:,}",
    )
    optimizer = config.optimizer
    schedule = f"{optimizer.lr_schedule}, {optimizer.lr_warmup_steps:,} steps of warm-up"
    yield "optimizer", f"AdamW, lr {optimizer.lr:g}, {schedule}, weight decay {optimizer.weight_decay:g}"


def _first_step(config: TrainingRoot, train: Any, examples: int, each: int, longest: int) -> list[list[int]]:
    """Return the tokens of the first optimizer step's sequences, by group, with responses at their limit."""
    from megarl.data.order import order_of

    rows = order_of(train, config.data.shuffle, config.run.seed).batch(0, examples)
    if not isinstance(config, OnlineConfig):
        return [_lengths(train[row]) for row in rows]
    room = config.rollout.max_new_tokens
    now = rows[: max(1, examples // config.algorithm.num_optimizer_steps_per_batch)]
    return [[min(longest, _lengths(train[row])[0] + room)] * each for row in now]


def _microbatches(config: TrainingRoot, lengths: list[list[int]]) -> tuple[int, int]:
    """Return the microbatches of a data-parallel rank and the tokens of all, prompts shared by none."""
    from megarl.batching.microbatch_plan import plan_microbatches

    group = config.sequences_per_example
    flat = [sum(each) for each in lengths] if group > 1 else [length for each in lengths for length in each]
    plan = plan_microbatches(
        flat,
        max_tokens=config.packing.max_tokens_per_microbatch,
        num_ranks=config.parallel.data_parallel_size,
    )
    return plan.num_microbatches, sum(flat)


def _evaluation(config: Any) -> str:
    settings = config.evaluation
    count = "all" if settings.num_prompts is None else f"{settings.num_prompts:,}"
    each = settings.num_samples_per_prompt
    what = f"{count} held-out problems"
    what += f" x {each} samples, temperature {settings.temperature:g}" if each > 1 else ""
    if not isinstance(config, OnlineConfig):
        return what
    if not config.evaluates:
        return "none"
    times = [
        *(["before the first step"] if settings.at_start is not False else []),
        *([f"every {settings.interval} steps"] if settings.interval else []),
        *(["at the end"] if settings.at_end is not False else []),
    ]
    return f"{' and '.join(times)}: {what}"


# --- the machine ---------------------------------------------------------------------------------


def _engine(config: Any) -> str:
    engine = config.rollout.engine
    shape = f"{engine.data_parallel_size} x tensor {engine.tensor_parallel_size}"
    return (
        f"{engine.backend}, {shape}, KV cache of {engine.kv_cache_gib:g} GiB per rank, at most "
        f"{engine.max_num_seqs} sequences of up to {config.longest_response:,} new tokens"
    )


def _layout(config: TrainingRoot) -> str:
    parallel = config.parallel
    sizes = {
        "tensor": parallel.tensor_parallel_size,
        "pipeline": parallel.pipeline_parallel_size,
        "context": parallel.context_parallel_size,
        "data": parallel.data_parallel_size,
        "expert": parallel.expert_parallel_size,
    }
    layout = " x ".join(f"{name} {size}" for name, size in sizes.items() if size > 1)
    count = f"{parallel.num_processes} rank{'s' if parallel.num_processes > 1 else ''}"
    return f"{config.trainer.backend}, {count}{f' ({layout})' if layout else ''}, launcher {config.launcher}"


def _memory(config: TrainingRoot) -> str:
    """Compare the plan's figures with the memory of this machine."""
    from megarl.platform import chosen_name
    from megarl.simulate.memory import while_generating, while_training
    from megarl.simulate.of_run import not_planned, plan_of
    from megarl.simulate.run import simulate

    ranks = config.parallel.num_processes
    try:
        simulation = simulate(plan_of(config, read_model_config(config.model.path)), ranks)
    except UserError as error:  # engines that do not divide the trainer's ranks
        return f"not planned: {one_line(str(error).splitlines()[0])}"
    fullest = simulation.gpus[max(range(ranks), key=lambda n: simulation.peak(simulation.gpus[n]))]
    peak = max(
        (while_training(fullest, simulation.offload), while_generating(fullest, simulation.offload)),
        key=lambda each: each.total,
    )
    parts = {name: getattr(peak, name) for name in type(peak).__dataclass_fields__}
    shown = " + ".join(f"{name.replace('_', ' ')} {_gib(size)}" for name, size in parts.items() if size)
    notes = "".join(f"; {line}" for line in not_planned(config))
    if chosen_name() == "cuda":
        import torch

        free, total = torch.cuda.mem_get_info()
        have, where = free, f"{_gib(free)} free of {_gib(total)} on this machine's GPU"
        needed, each = peak.total, "GPU"
    else:
        from megarl.cluster.limits import available_memory

        have, needed = available_memory(), sum(map(simulation.peak, simulation.gpus))
        where, each = (
            f"{_gib(have)} available here, no GPU, beside about 1 GiB of libraries per process",
            "rank",
        )
    fits = "fits" if needed <= have else "DOES NOT FIT HERE"
    return f"{_gib(peak.total)} GiB per {each} ({shown}): {fits}, {where}{notes}"


def _gib(size: float) -> str:
    return f"{size / GIB:.2f}" if size < 100 * GIB else f"{size / GIB:,.0f}"


def checkpoint_bytes(config: TrainingRoot, architecture: Any) -> int:
    """Estimate the size of a checkpoint: parameters and optimizer state of what is trained."""
    from megarl.models.lora import adapted_modules, num_adapter_parameters

    if config.lora is None:
        trained = sum(math.prod(shape) for shape in architecture.hf_shapes().values())
    else:
        trained = num_adapter_parameters(adapted_modules(architecture, config.lora), config.lora.rank)
    item = _ITEM[config.model.dtype]
    # Adam's two moments, and float32 master parameters unless they are the parameters.
    state = (8 if item == 4 else 12) if config.checkpoint.save_optimizer else 0
    models = 2 if getattr(config, "critic", None) is not None else 1
    return trained * (item + state) * models


def _disk(config: TrainingRoot, architecture: Any, count: int) -> str:
    """Estimate checkpoints and the export, and compare them with the free space."""
    checkpoint, each = config.checkpoint, checkpoint_bytes(config, architecture)
    steps, interval = config.training.num_steps, checkpoint.interval
    written = math.ceil(steps / interval) if interval else 1
    # A new one is complete before the oldest is deleted.
    kept = min(written, checkpoint.keep + 1) + (checkpoint.keep_best_metric is not None)
    export = count * _ITEM[config.model.dtype] if checkpoint.export_hf else 0
    needed = kept * each + export
    place = Path(config.run.dir).resolve()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    writable = "" if os.access(place, os.W_OK) else f", and {place} CANNOT BE WRITTEN"
    fits = f"{_gib(free)} GiB free" if needed <= free else f"NOT ENOUGH: {_gib(free)} GiB free"
    return (
        f"{written:,} checkpoint{'s' if written > 1 else ''} of {_gib(each)} GiB, {kept} at a time, and "
        f"{_gib(export)} GiB of export: {_gib(needed)} GiB; {fits}{writable}"
    )


# --- settings ------------------------------------------------------------------------------------


def _changed(config: Section) -> str:
    # The lines on the data describe its sources.
    found = [
        text for text in changed_settings(config) if not text.startswith(("data.train.", "data.held_out."))
    ]
    more = f" and {len(found) - _NUM_CHANGED} more" if len(found) > _NUM_CHANGED else ""
    return ", ".join(found[:_NUM_CHANGED]) + more if found else "nothing"


def changed_settings(section: Section, prefix: str = "") -> Iterator[str]:
    """Yield "key=value" of every setting that has a default and another value."""
    for name, field in type(section).model_fields.items():
        value, default = getattr(section, name), None
        if not field.is_required():
            default = field.get_default(call_default_factory=True, validated_data={})
            if value == default:
                continue
        if not isinstance(value, Section):
            if not field.is_required():
                yield f"{prefix}{name}={_shown(value)}"
            continue
        inner = list(changed_settings(value, f"{prefix}{name}."))
        if not inner and not field.is_required():  # that the section is there is what differs
            inner = [f"{prefix}{name}={{...}}"]
        yield from inner


def _shown(value: Any) -> str:
    text = str(value) if isinstance(value, str) else json.dumps(value, default=str)
    return one_line(text if len(text) <= _MAX_VALUE else f"{text[: _MAX_VALUE - 3]}...")
