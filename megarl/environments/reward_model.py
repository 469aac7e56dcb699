"""Reward-model environment: a model exported by `megarl rm`, or another one-label sequence classifier.

It runs with transformers on the CPU of the worker process (remote.py).
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megarl.environments.base import Verifier
from megarl.errors import UserError

if TYPE_CHECKING:
    from megarl.config.environments import RewardModelConfig
    from megarl.records import Prompt


class RewardModelEnvironment(Verifier):
    """Reward: the model's score of the last token, times ``scale``. ``info`` has the ``score``.

    The model reads the prompt's token ids, the response's text in its own tokenization, and EOS, as in
    training. Its tokenizer must decode the prompt's ids to the same text.
    """

    def __init__(self, config: RewardModelConfig, field: str = "environment") -> None:
        import torch
        import transformers

        path = Path(config.path)
        if not (path / "config.json").is_file():
            raise UserError(f"{field}.path: {path} has no config.json; a directory of `megarl rm` is wanted")
        torch.set_num_threads(config.num_threads)
        hf = transformers.AutoConfig.from_pretrained(path)
        names = getattr(hf, "architectures", None) or []
        if hf.num_labels != 1 or not any(str(n).endswith("ForSequenceClassification") for n in names):
            raise UserError(
                f"{field}.path: {path} is no sequence classification model with one label (architectures "
                f"{names}, {hf.num_labels} labels)"
            )
        self._scale = config.scale
        self._tokenizer = transformers.AutoTokenizer.from_pretrained(path)
        self._model = transformers.AutoModelForSequenceClassification.from_pretrained(
            path, dtype=getattr(torch, config.dtype)
        ).eval()

    def __copy__(self) -> RewardModelEnvironment:
        episode = RewardModelEnvironment.__new__(RewardModelEnvironment)
        episode.__dict__ |= self.__dict__
        return episode

    async def judge(self, prompt: Prompt, response_text: str) -> tuple[float, dict[str, Any]]:
        """Return the score of a response; ValueError if the tokenizers disagree on the prompt."""
        score = await asyncio.to_thread(self._score, prompt, response_text)
        return self._scale * score, {"score": score}

    def _score(self, prompt: Prompt, response_text: str) -> float:
        import torch

        read = self._tokenizer.decode(prompt.token_ids)
        if not read.endswith(prompt.text):
            raise ValueError(f"the reward model's tokenizer reads the prompt's token ids as {read[-80:]!r}")
        ids = prompt.token_ids.tolist()
        ids += self._tokenizer(response_text, add_special_tokens=False)["input_ids"]
        if self._tokenizer.eos_token_id is not None:
            ids.append(self._tokenizer.eos_token_id)
        with torch.inference_mode():
            # One sequence without padding: hidden state and score of its last token.
            hidden = self._model.base_model(torch.tensor([ids])).last_hidden_state[0, -1]
            return float(self._model.score(hidden)[0])
