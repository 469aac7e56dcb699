"""Build a tiny, randomly initialised Qwen3 model and its tokenizer, for the quickstart.

The directory is an ordinary Hugging Face one (config, fp32 safetensors, generation_config, fast tokenizer
with a chat template), so whatever works on it works on a real model. The same arguments always give the same
bytes.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM, Qwen3MoeForCausalLM

PAD, SYSTEM, USER, ASSISTANT, EOS = "<|pad|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"
VOCAB_SIZE = 512
MAX_POSITIONS = 512

# One token before and one after each message: a tiny model's steps are dominated by prompt tokens.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('the role ' + message['role'] + ' is not known to this template') }}{% endif %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)

# Tasks whose wording becomes whole-word tokens. Any other text also works, with more tokens.
TASKS: dict[str, dict[str, int]] = {
    "chain_sum": {},
    "basic_arithmetic": {},
    "products": {},
    "gcd": {},
    "lcm": {},
    "simple_equations": {},
    "count_bits": {},
    "decimal_chain_sum": {},
}


def question_texts() -> Iterator[str]:
    """Yield texts to fit the tokenizer to: 200 questions of each task."""
    import reasoning_gym

    for task, arguments in TASKS.items():
        for entry in reasoning_gym.create_dataset(task, seed=0, size=200, **arguments):
            yield entry["question"]


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Build a tokenizer with single digits, frequent words whole, everything else down to bytes.

    Byte-level, so no text is unknown and decode(encode(x)) == x for every x. A space before a number is a
    separate token, so a digit is the same token wherever it occurs.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    special = [PAD, SYSTEM, USER, ASSISTANT, EOS]
    tokenizer = Tokenizer(models.BPE())
    pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\p{N}"), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=special,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        min_frequency=1,
        show_progress=False,
    )
    tokenizer.train_from_iterator(question_texts(), trainer)
    missing = VOCAB_SIZE - tokenizer.get_vocab_size()
    assert missing >= 0
    tokenizer.add_special_tokens([f"<|reserved_{i}|>" for i in range(missing)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        chat_template=CHAT_TEMPLATE,
        model_max_length=MAX_POSITIONS,
        clean_up_tokenization_spaces=False,
    )


def make_model(arguments: argparse.Namespace, eos: int, pad: int) -> Qwen3ForCausalLM | Qwen3MoeForCausalLM:
    """Build a Qwen3 (norms on q and k, grouped queries, tied embeddings) with random fp32 weights.

    With ``experts``, a Qwen3-MoE: this many experts per layer, each of size ``intermediate``, two per token.
    """
    import torch
    from transformers import (
        GenerationConfig,
        Qwen3Config,
        Qwen3ForCausalLM,
        Qwen3MoeConfig,
        Qwen3MoeForCausalLM,
    )

    torch.manual_seed(arguments.seed)
    experts = {
        "num_experts": arguments.experts,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": arguments.intermediate,
        "norm_topk_prob": True,
    }
    config_class = Qwen3MoeConfig if arguments.experts else Qwen3Config
    config = config_class(
        **(experts if arguments.experts else {}),
        vocab_size=VOCAB_SIZE,
        hidden_size=arguments.hidden,
        intermediate_size=arguments.intermediate,
        num_hidden_layers=arguments.layers,
        num_attention_heads=arguments.heads,
        num_key_value_heads=arguments.kv_heads,
        head_dim=arguments.head_dim,
        max_position_embeddings=MAX_POSITIONS,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=eos,
        pad_token_id=pad,
        dtype="float32",
    )
    model = (Qwen3MoeForCausalLM if arguments.experts else Qwen3ForCausalLM)(config)
    model.generation_config = GenerationConfig(eos_token_id=eos, pad_token_id=pad)
    return model


def parse_arguments() -> argparse.Namespace:
    """Parse the command line; exit with one line for sizes that cannot make a model."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="directory to write")
    parser.add_argument("--seed", type=int, required=True, help="seed of the random weights")
    for name, default in (
        ("layers", 4),
        ("hidden", 128),
        ("heads", 4),
        ("kv-heads", 2),
        ("head-dim", 32),
        ("intermediate", 384),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"default {default}")
    help = "experts in every layer, two per token; default 0: a dense model"
    parser.add_argument("--experts", type=int, default=0, help=help)
    arguments = parser.parse_args()
    for name, value in vars(arguments).items():
        if name not in ("output", "seed", "experts") and value < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, not {value}")
    if arguments.heads % arguments.kv_heads:
        parser.error(f"--heads {arguments.heads} is not a multiple of --kv-heads {arguments.kv_heads}")
    if arguments.experts < 0 or arguments.experts == 1:
        parser.error(f"--experts must be 0 or at least 2, not {arguments.experts}")
    if arguments.head_dim % 2:
        parser.error(f"--head-dim {arguments.head_dim} must be even (rotary embedding)")
    return arguments


def main() -> int:
    """Write the directory, complete or not at all."""
    arguments = parse_arguments()
    output: Path = arguments.output
    if (
        output.exists()
        and not (output / "config.json").is_file()
        and (output.is_file() or any(output.iterdir()))
    ):
        print(
            f"make_tiny_model: {output} exists and is not a model directory; not touching it", file=sys.stderr
        )
        return 2
    tokenizer = make_tokenizer()
    model = make_model(arguments, tokenizer.eos_token_id, tokenizer.pad_token_id)
    output.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))
    try:
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()
        tokenizer.save_pretrained(staging)
        model.save_pretrained(staging)
        staging.chmod(0o755)
        for file in staging.iterdir():
            file.chmod(0o644)  # safetensors makes it readable for the owner only
        if output.exists():
            shutil.rmtree(output)
        os.replace(staging, output)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    print(f"{output}: Qwen3, {model.num_parameters() / 1e6:.2f} M parameters, {len(tokenizer)} tokens")
    return 0


if __name__ == "__main__":
    sys.exit(main())
