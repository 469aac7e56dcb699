"""Files beside exported weights: the model card (README.md), and the chat template of a model without one."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

from megarl.config.chat_templates import CHAT_TEMPLATES
from megarl.config.data import BenchmarkSource, HfLocation, PromptFormat, parts_of
from megarl.config.hub import HubDirectory, is_model_id
from megarl.config.load import dump_config
from megarl.config.training import TrainingRoot

_METHODS = {
    "sft": "supervised fine-tuning",
    "dpo": "training on preference pairs",
    "rm": "training of a reward model on preference pairs (Bradley-Terry)",
    "grpo": "reinforcement learning with verifiable rewards (GRPO)",
    "ppo": "reinforcement learning with a critic (PPO)",
    "distill": "on-policy distillation",
}
_PACKAGES = ("torch", "transformers", "megatron-core", "datasets")


def write_chat_template(directory: Path, prompt_format: PromptFormat) -> None:
    """Give an exported model without a chat template the one that it was trained with, and its EOS."""
    name = prompt_format.chat_template
    config_path = directory / "tokenizer_config.json"
    if not isinstance(name, str) or not config_path.is_file():
        return
    config = json.loads(config_path.read_text(encoding="utf-8"))
    if config.get("chat_template") or (directory / "chat_template.jinja").is_file():
        return
    named = CHAT_TEMPLATES.get(name)
    text = Path(name).read_text(encoding="utf-8") if named is None else named.text
    (directory / "chat_template.jinja").write_text(text, encoding="utf-8")
    if named is None or named.ends_turns is None:
        return
    config["eos_token"] = named.ends_turns
    config_path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    vocabulary = _token_ids(directory / "tokenizer.json")
    generation = directory / "generation_config.json"
    if (end := vocabulary.get(named.ends_turns)) is not None and generation.is_file():
        settings = json.loads(generation.read_text(encoding="utf-8"))
        before = settings.get("eos_token_id")
        others = before if isinstance(before, list) else [] if before is None else [before]
        settings["eos_token_id"] = [end, *(each for each in others if each != end)]
        generation.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def _token_ids(path: Path) -> dict[str, int]:
    """Added tokens of a tokenizer.json -> id."""
    if not path.is_file():
        return {}
    found = json.loads(path.read_text(encoding="utf-8"))
    return found["model"]["vocab"] | {each["content"]: each["id"] for each in found.get("added_tokens", ())}


def write_card(directory: Path, kind: str, config: TrainingRoot, summary: Mapping[str, Any]) -> None:
    """Write the model card of a run's export.

    Args:
        directory: the export, a Hugging Face directory or PEFT adapters.
        kind: sft, dpo, rm, grpo, ppo or distill.
        config: the run's.
        summary: entries of summary.json.
    """
    base = config.model.path
    written = base.written if isinstance(base, HubDirectory) else base
    is_adapter = (directory / "adapter_config.json").is_file()
    head: dict[str, Any] = {"library_name": "peft" if is_adapter else "transformers"}
    head["pipeline_tag"] = "text-classification" if kind == "rm" else "text-generation"
    head["tags"] = ["megarl", kind, *(["lora"] if config.lora is not None else [])]
    if is_model_id(written):
        head |= {"base_model": written.partition("@")[0]}
        head |= {"base_model_relation": "adapter" if is_adapter else "finetune"}
    if names := sorted(set(_datasets(config))):
        head["datasets"] = names
    figures = {name: value for name, value in summary.items() if isinstance(value, int | float)}
    commit = f" (commit {base.commit})" if isinstance(base, HubDirectory) else ""
    versions = ", ".join(f"{name} {_version(name)}" for name in ("megarl", *_PACKAGES) if _version(name))
    lines = [
        "---",
        yaml.safe_dump(head, sort_keys=False).strip(),
        "---",
        "",
        f"# {Path(config.run.dir).name}",
        "",
        f"{'Adapters of' if is_adapter else 'Trained from'} `{written}`{commit} by {_METHODS.get(kind, kind)} with MegaRL.",
        "",
        "## Data",
        "",
        *(f"- `{at}`: {what}" for at, what in _sources(config)),
        "",
        "## Figures at the end of the run",
        "",
        "| | |",
        "|---|---|",
        *(f"| {name} | {value:.6g} |" for name, value in figures.items()),
        "",
        "## Settings",
        "",
        "```yaml",
        dump_config(config).strip(),
        "```",
        "",
        f"Versions: {versions}.",
        "",
    ]
    (directory / "README.md").write_text("\n".join(lines), encoding="utf-8")


def _sources(config: TrainingRoot) -> Iterator[tuple[str, str]]:
    """Yield (key, description) of every data source; files by name, since paths say nothing elsewhere."""
    for split in ("train", "held_out"):
        for at, part in parts_of(getattr(config.data, split), f"data.{split}"):
            match part:
                case HfLocation():
                    subset = f", {part.subset}" if part.subset else ""
                    yield at, f"{part.dataset}{subset}, split {part.split}"
                case BenchmarkSource():
                    yield at, f"benchmark {part.name}" + (f", split {part.split}" if part.split else "")
                case _ if getattr(part, "task", None):
                    yield at, f"reasoning-gym {part.task}, {part.size:,} problems from seed {part.seed}"
                case _ if getattr(part, "path", None):
                    yield at, Path(part.path).name
                case _:
                    yield at, part.source


def _datasets(config: TrainingRoot) -> Iterator[str]:
    for _, part in parts_of(config.data.train, "train"):
        if isinstance(part, HfLocation) and is_model_id(part.dataset):
            yield part.dataset


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
