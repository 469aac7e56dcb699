"""TRL's GRPOTrainer on the configuration of a `megarl grpo` run.

``python -m benchmarks.grpo_trainers JOB RESULT``: JOB is a JSON file with the run's YAML file and the
trainer's options; RESULT gets one row per step.
"""

from __future__ import annotations

import asyncio
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megarl.config.grpo import GrpoConfig
from megarl.config.load import load_config
from megarl.data.prompts import load_prompts
from megarl.environments import grade, make
from megarl.records import Prompt


class Clock:
    """Seconds by phase of the current step, and the finished steps."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []
        self._phases: dict[str, float] = {}
        self._began = time.perf_counter()

    def start(self) -> None:
        """Start a step."""
        self._phases, self._began = {}, time.perf_counter()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Attribute the time inside to phase ``name``."""
        began = time.perf_counter()
        yield
        self._phases[name] = self._phases.get(name, 0.0) + time.perf_counter() - began

    def end_step(self, values: dict[str, float]) -> None:
        """Finish a step with its metrics, and start the next."""
        seconds = time.perf_counter() - self._began
        phases = {f"seconds_{name}": value for name, value in self._phases.items()}
        train = seconds - sum(self._phases.values())
        self.steps.append({"seconds": seconds, **phases, "seconds_train": train, **values})
        self.start()


def run(config: GrpoConfig, options: dict[str, Any], save_to: str | None) -> list[dict[str, float]]:
    """Train for ``training.num_steps`` on the same problems, in order, with the same verifier.

    The trained model is written to ``save_to``, if given, after the last step's clock has stopped.
    """
    from transformers import AutoTokenizer, TrainerCallback
    from trl import GRPOTrainer

    tokenizer = AutoTokenizer.from_pretrained(config.model.path)
    dataset = load_prompts(config.data, tokenizer, max_prompt_tokens=10_000, split="train")
    count = config.training.num_steps * config.rollout.num_prompts_per_step
    prompts = [dataset[i] for i in range(count)]
    for prompt in prompts:  # TRL tokenises the text
        assert tokenizer(prompt.text)["input_ids"] == prompt.token_ids.tolist(), prompt.text
    environment = make(config.data.train)
    clock, seen = Clock(), dict[str, float]()

    def reward(completions: list[str], completion_ids: list[list[int]], number: list[int], **_: Any) -> Any:
        pairs = zip(number, completions, strict=True)
        rewards = [asyncio.run(grade(environment, prompts[i], text))[0] for i, text in pairs]
        lengths = [len(ids) for ids in completion_ids]
        seen.update(
            reward_mean=sum(rewards) / len(rewards),
            num_response_tokens=sum(lengths),
            num_tokens=sum(lengths) + sum(len(prompts[i].token_ids) for i in number),
        )
        return rewards

    class Timed(GRPOTrainer):
        def _generate(self, *args: Any, **kwargs: Any) -> Any:
            with clock.phase("rollout"):
                return super()._generate(*args, **kwargs)

        def _calculate_rewards(self, *args: Any, **kwargs: Any) -> Any:
            with clock.phase("reward"):
                return super()._calculate_rewards(*args, **kwargs)

    class Steps(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            clock.start()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            clock.end_step(dict(seen))

    with tempfile.TemporaryDirectory() as folder:
        trainer = Timed(
            model=config.model.path,
            args=_arguments(config, folder, options),
            reward_funcs=reward,
            train_dataset=_rows(prompts),
            processing_class=tokenizer,
            callbacks=[Steps()],
        )
        trainer.train()
        if save_to is not None:
            trainer.save_model(save_to)
    return clock.steps


def _rows(prompts: list[Prompt]) -> Any:
    from datasets import Dataset

    return Dataset.from_list([{"prompt": prompt.text, "number": i} for i, prompt in enumerate(prompts)])


def _arguments(config: GrpoConfig, folder: str, options: dict[str, Any]) -> Any:
    """Translate the run's configuration to TRL's arguments; the rest are TRL's defaults."""
    from trl import GRPOConfig

    rollout, optimizer, algorithm = config.rollout, config.optimizer, config.algorithm
    assert optimizer.lr_schedule == "constant"
    assert algorithm.normalize_std
    assert algorithm.loss_aggregation == "token"
    samples = rollout.num_prompts_per_step * rollout.num_generations_per_prompt
    return GRPOConfig(
        output_dir=folder,
        max_steps=config.training.num_steps,
        gradient_accumulation_steps=samples // options["per_device_train_batch_size"],
        num_generations=rollout.num_generations_per_prompt,
        max_completion_length=rollout.max_new_tokens,
        temperature=rollout.temperature,
        top_p=rollout.top_p,
        top_k=rollout.top_k,
        beta=algorithm.kl_coef,
        epsilon=algorithm.clip_low,
        epsilon_high=algorithm.clip_high,
        learning_rate=optimizer.lr,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=optimizer.lr_warmup_steps,
        weight_decay=optimizer.weight_decay,
        adam_beta1=optimizer.adam_beta1,
        adam_beta2=optimizer.adam_beta2,
        adam_epsilon=optimizer.adam_eps,
        max_grad_norm=optimizer.max_grad_norm,
        bf16=False,
        use_cpu=True,
        model_init_kwargs={"dtype": "float32"},
        shuffle_dataset=False,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=config.run.seed,
        **options,
    )


def main(job_file: Path, result_file: Path) -> None:
    """Run the training and write its steps."""
    job = json.loads(job_file.read_text())
    config = load_config(GrpoConfig, Path(job["config"]), [])
    result_file.write_text(json.dumps(run(config, job["options"], job["save_to"])))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
