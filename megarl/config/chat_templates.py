"""Chat templates by name, for ``data.format.chat_template``.

All of them append: a message is rendered the same whatever follows, so that every turn of the assistant
can be learned. The models' own templates of qwen3 and deepseek_r1 leave out earlier reasoning.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

_FOLDER = Path(__file__).with_name("templates")


@dataclass(frozen=True, slots=True)
class ChatTemplate:
    """A template: the tokens that it writes, and the one that ends an answer (None: the tokenizer's EOS)."""

    name: str
    tokens: tuple[str, ...]
    ends_turns: str | None

    @property
    def text(self) -> str:
        """The Jinja template."""
        return (_FOLDER / f"{self.name}.jinja").read_text(encoding="utf-8")


CHAT_TEMPLATES = {
    name: ChatTemplate(name, tokens, end)
    for name, tokens, end in (
        ("chatml", ("<|im_start|>", "<|im_end|>"), "<|im_end|>"),
        ("llama3", ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"), "<|eot_id|>"),
        ("mistral", ("[INST]", "[/INST]"), None),
        ("gemma", ("<start_of_turn>", "<end_of_turn>"), "<end_of_turn>"),
        ("qwen3", ("<|im_start|>", "<|im_end|>"), "<|im_end|>"),
        ("deepseek_r1", ("<｜User｜>", "<｜Assistant｜>", "<｜end▁of▁sentence｜>"), "<｜end▁of▁sentence｜>"),
    )
}
"""Name -> template."""
