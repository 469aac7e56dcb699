"""The tokenizer of a model directory: load, check against the model, stop tokens, chat template."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megarl.config.chat_templates import CHAT_TEMPLATES, ChatTemplate
from megarl.data.control_tokens import control_tokens, protect, protect_messages, tokenize
from megarl.data.message_names import check_names
from megarl.data.template_limits import check_template
from megarl.errors import UserError
from megarl.files import read_json_object

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from megarl.config.data import PromptFormat
    from megarl.records import TokenIds

Message = Mapping[str, Any]


def load_tokenizer(model_dir: str | Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a Hugging Face directory, without access to the hub.

    Raises:
        UserError: no such directory, or no tokenizer in it.
    """
    from transformers import AutoTokenizer

    path = Path(model_dir)
    if not path.is_dir():
        raise UserError(f"model.path: no directory {path}")
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(path, local_files_only=True)
    except Exception as error:  # the library raises OSError, ValueError, KeyError and others
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"model.path: cannot load a tokenizer from {path}: {reason}") from error
    # If its files are missing, the library builds a tokenizer of a few special tokens from config.json.
    names = list(tokenizer.vocab_files_names.values())
    if not any((path / name).is_file() for name in names):
        raise UserError(f"model.path: no tokenizer in {path}; expected {' or '.join(names)}")
    return tokenizer


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, vocab_size: int, prompt_format: PromptFormat) -> None:
    """Raise UserError if the tokenizer does not fit the model or the prompt format.

    Args:
        tokenizer: as loaded.
        vocab_size: rows of the model's embedding, without MegaRL's padding.
        prompt_format: ``data.format``.

    Raises:
        UserError: all violations, one per line.
    """
    problems = []
    largest = max(tokenizer.get_vocab().values())
    if largest >= vocab_size:
        problems.append(
            f"model.path: the tokenizer's largest token id is {largest}, but the model's vocabulary "
            f"has {vocab_size} entries (ids 0 to {vocab_size - 1})"
        )
    if tokenizer.eos_token_id is None:
        problems.append("model.path: the tokenizer has no EOS token; set eos_token in tokenizer_config.json")
    if prompt_format.chat_template:
        if tokenizer.chat_template is None:
            problems.append(
                "data.format.chat_template: the tokenizer has no chat template; name one "
                f"({', '.join(CHAT_TEMPLATES)} or a file), or use false for bare prompts"
            )
        else:
            check_template(tokenizer.chat_template, "model.path")
    else:
        if prompt_format.system_prompt is not None:
            problems.append("data.format.system_prompt: needs data.format.chat_template: true")
        if tokenizer.eos_token_id is not None and tokenizer("a")["input_ids"][-1] == tokenizer.eos_token_id:
            problems.append(
                "data.format.chat_template: false does not work with this tokenizer: it appends EOS to every "
                "text, so that nothing would be generated"
            )
    if problems:
        raise UserError("\n".join(problems))


def apply_format(tokenizer: PreTrainedTokenizerBase, prompt_format: PromptFormat) -> None:
    """Set the chat template and the template's variables that data.format names.

    The variables are set at the head of the template, so that every rendering has them.

    Raises:
        UserError: the file cannot be read, or the template reads no such variable.
    """
    path, variables = prompt_format.chat_template, prompt_format.chat_template_kwargs
    if isinstance(path, str) and (named_template := CHAT_TEMPLATES.get(path)) is not None:
        _use(tokenizer, named_template)
    elif isinstance(path, str):
        try:
            tokenizer.chat_template = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"data.format.chat_template: cannot read {path}: {error}") from error
    if not variables or tokenizer.chat_template is None:  # check_tokenizer() refuses the latter
        return
    named = tokenizer.chat_template if isinstance(tokenizer.chat_template, dict) else None
    for name in variables:
        if name not in (json.dumps(named) if named else str(tokenizer.chat_template)):
            raise UserError(f"data.format.chat_template_kwargs: the chat template reads no variable {name!r}")
    head = "".join(f"{{% set {name} = {json.dumps(value)} %}}" for name, value in variables.items())
    if named:
        tokenizer.chat_template = {name: head + template for name, template in named.items()}
    else:
        tokenizer.chat_template = head + str(tokenizer.chat_template)


def _use(tokenizer: PreTrainedTokenizerBase, template: ChatTemplate) -> None:
    """Set a template of MegaRL's; what ends its turns becomes the tokenizer's EOS.

    Raises:
        UserError: the vocabulary lacks tokens that the template writes.
    """
    vocabulary = tokenizer.get_vocab()
    if missing := [token for token in template.tokens if token not in vocabulary]:
        raise UserError(
            f"data.format.chat_template: {template.name} writes {', '.join(missing)}, which the tokenizer's "
            "vocabulary does not have; use the template of another family, or a file"
        )
    tokenizer.chat_template = template.text
    if template.ends_turns is not None:
        tokenizer.eos_token = template.ends_turns


class TurnReader:
    """Decodes turns of the policy. When pickled it holds only the decoder: workers need no transformers.

    Args:
        tokenizer: the model's.
        stop_token_ids: tokens that end a turn; the engine includes them in the sampled tokens.
    """

    def __init__(self, tokenizer: Any, stop_token_ids: Collection[int]) -> None:
        self._tokenizer, self._stops = _decoder(tokenizer), frozenset(stop_token_ids)

    def __call__(self, sampled: TokenIds, *, raw: bool = False) -> str:
        """Decode token ids [N] without special tokens; with ``raw``, only without the final stop token."""
        ids: list[int] = sampled.tolist()
        if raw and ids and ids[-1] in self._stops:
            del ids[-1]
        return str(self._tokenizer.decode(ids, skip_special_tokens=not raw))


def _decoder(tokenizer: Any) -> Any:
    """Return the backend tokenizer if transformers' ``decode`` adds nothing to it; else ``tokenizer``."""
    from transformers import PreTrainedTokenizerFast

    adds = getattr(tokenizer, "clean_up_tokenization_spaces", True)
    if adds or getattr(type(tokenizer), "_decode", None) is not PreTrainedTokenizerFast._decode:
        return tokenizer
    return tokenizer.backend_tokenizer


def stop_token_ids(tokenizer: PreTrainedTokenizerBase, model_dir: str | Path) -> list[int]:
    """Return all token ids that end a response, sorted: the tokenizer's EOS and those of the model.

    Chat models often end a turn with another token than the tokenizer's EOS, given only in
    generation_config.json; config.json is read if that file gives none.

    Raises:
        UserError: no EOS is given, or a file cannot be read.
    """
    ids: set[int] = set()
    if tokenizer.eos_token_id is not None:
        ids.add(int(tokenizer.eos_token_id))
    for name in ("generation_config.json", "config.json"):
        named = _eos_ids(Path(model_dir) / name)
        ids.update(named)
        if named:
            break
    if not ids:
        raise UserError(
            f"model.path: neither the tokenizer nor the configuration in {model_dir} names an EOS"
        )
    return sorted(ids)


def _eos_ids(path: Path) -> list[int]:
    if not path.is_file():
        return []
    eos = read_json_object(path, "model.path").get("eos_token_id")
    if eos is None:
        return []
    ids = eos if isinstance(eos, list) else [eos]
    if not all(isinstance(i, int) for i in ids):
        raise UserError(f"model.path: eos_token_id in {path} is {eos!r}, not a token id or a list of them")
    return list(ids)


def chat_ids(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    *,
    add_generation_prompt: bool,
    tools: Sequence[Any] | None = None,
) -> list[int]:
    """Tokenise messages with the tokenizer's chat template; raises as :func:`chat_text`."""
    text = chat_text(tokenizer, messages, add_generation_prompt=add_generation_prompt, tools=tools)
    return tokenize(tokenizer, text)


def chat_text(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    *,
    add_generation_prompt: bool,
    tools: Sequence[Any] | None = None,
) -> str:
    """Render messages with the chat template, protected: for :func:`tokenize`, whole or in parts.

    Raises:
        ValueError: the template raises an error or would silently drop tools, tool calls, reasoning or
            names, or an assistant's text spells a token that opens or ends a turn. Elsewhere such tokens
            stay text.
    """
    template = json.dumps(tokenizer.chat_template)
    if tools and "tools" not in template:
        raise ValueError("the chat template does not support tools")
    if any("tool_calls" in message for message in messages) and "tool_call" not in template:
        raise ValueError("the chat template does not support tool_calls")
    if any("reasoning_content" in message for message in messages) and "reasoning_content" not in template:
        raise ValueError("the chat template does not support reasoning_content")
    check_names(tokenizer, messages)
    given, shown = [dict(message) for message in messages], list(tools) if tools else None
    safe = protect_messages(tokenizer, given)
    safe_tools = protect(shown, control_tokens(tokenizer).other)
    try:
        found: Any = tokenizer.apply_chat_template(
            safe,
            tools=safe_tools,
            add_generation_prompt=add_generation_prompt,
            tokenize=False,
        )
    except Exception as error:  # templates raise through jinja2, in many ways
        raise ValueError(f"the chat template refuses it: {error}") from error
    return str(found)
