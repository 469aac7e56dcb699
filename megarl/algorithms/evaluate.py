"""Greedy accuracy on held-out problems: inside a run, and as `megarl eval` of a Hugging Face directory."""

from __future__ import annotations

from megarl.algorithms.engines import attach_weights, start_engine
from megarl.algorithms.model import read_model
from megarl.algorithms.rollouts import Rollouts, accuracy, sample_row
from megarl.config.schema import EvalConfig, ParallelConfig
from megarl.data.prompts import MAX_COMPARED_PROBLEMS, PromptDataset, load_prompts
from megarl.data.tokenizer import stop_token_ids
from megarl.environments import make
from megarl.errors import UserError
from megarl.metrics.console import Console
from megarl.metrics.timers import PhaseTimers
from megarl.records import Group, Prompt
from megarl.rundir import RunDirectory
from megarl.trainer.megatron.initialize import finalize, initialize


def pick_problems(held_out: PromptDataset, count: int, console: Console) -> list[Prompt]:
    """The first ``count`` held-out problems that do not occur among the training problems."""
    with console.waiting("comparison of held-out and training problems"):
        unseen = held_out.unseen
    if unseen is None:
        console.warn(
            "held-out problems were not compared with the training problems, to leave out those that "
            "occur there: "
            f"there are more than {MAX_COMPARED_PROBLEMS} of them (data.train.size)"
        )
        unseen = list(range(len(held_out)))
    if left_out := len(held_out) - len(unseen):
        console.note(f"{left_out} of {len(held_out)} held-out problems also occur in training: left out")
    if len(unseen) < count:
        raise UserError(
            f"evaluation.num_prompts: {count} problems wanted, {len(unseen)} of {len(held_out)} held-out "
            "problems do not occur in training; make data.held_out.size larger"
        )
    return [held_out[i] for i in unseen[:count]]


def greedy(
    rollouts: Rollouts, problems: list[Prompt], step: int, max_new_tokens: int, console: Console
) -> list[Group]:
    """Answer every problem once, at temperature 0, and say how many were right."""
    with console.progress("evaluation", total=len(problems)) as advance:
        groups = rollouts.sample(
            problems,
            step=step,
            generations=1,
            temperature=0.0,
            max_new_tokens=max_new_tokens,
            advance=advance,
            phase="other",
        )
    console.note(f"step {step}: greedy accuracy {accuracy(groups):.1%} on {len(problems)} held-out problems")
    return groups


def run_eval(config: EvalConfig) -> None:
    """Evaluate ``model.path`` with a vLLM engine; writes summary.json and samples/step_0.jsonl."""
    architecture, tokenizer, longest = read_model(config)
    room = longest - config.rollout.max_new_tokens
    held_out = load_prompts(config.data, tokenizer, max_prompt_tokens=room, split="held_out")
    console, timers = Console("eval"), PhaseTimers()
    with RunDirectory(config.run.dir) as directory:
        directory.open(config.model_dump(mode="json"))
        problems = pick_problems(held_out, config.evaluation.num_prompts, console)
        engine = start_engine(
            config.model,
            config.rollout.engine,
            max_model_len=longest,
            seed=config.run.seed,
            log_dir=directory.path,
        )
        context = initialize(ParallelConfig(), config.run.seed)
        from megarl.trainer.megatron.policy import MegatronPolicy

        policy = MegatronPolicy(context, architecture, config.model)
        owners = policy.weight_owners()
        with console.waiting("vLLM engine"):
            attach_weights(engine, architecture, owners)
        engine.sync(0)
        stops = tuple(stop_token_ids(tokenizer, config.model.path))
        environment = make(config.data.held_out, "data.held_out")
        rollouts = Rollouts(engine, environment, tokenizer, stops, timers, config.run.seed)
        groups = greedy(rollouts, problems, 0, config.rollout.max_new_tokens, console)
        samples = [sample for group in groups for sample in group.samples]
        directory.write_samples(
            0,
            [sample_row(0, group, sample) for group in groups for sample in group.samples],
        )
        directory.write_summary(
            {
                "accuracy": accuracy(groups),
                "reward_mean": sum(s.reward or 0.0 for s in samples) / len(samples),
                "num_prompts": len(problems),
                "wall_seconds": timers.end_step()["seconds"],
            }
        )
        console.note(f"Answers: {directory.samples_path / 'step_0.jsonl'}")
        engine.shutdown()
    finalize()
