"""`megarl chat`: talk to a model through an engine, with the weights of its files."""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from megarl.config.hub import fetch, is_id, resolve_id
from megarl.config.model import ModelConfig, is_checkpoint, read_model_config
from megarl.config.parallel import ParallelConfig
from megarl.config.rollout import EngineConfig
from megarl.data.tokenizer import TurnReader, chat_ids, load_tokenizer, stop_token_ids
from megarl.errors import UserError
from megarl.inference.client import SessionClient
from megarl.inference.interface import Engine, GenerateRequest, SamplingConfig
from megarl.inference.placement import this_machine
from megarl.loops.engine_setup import attach_weights, start_engine
from megarl.loops.evaluation import CheckpointWeights
from megarl.loops.start_weights import convert_start
from megarl.metrics.console import Console
from megarl.models import load_architecture
from megarl.records import token_ids
from megarl.terminal import printable
from megarl.trainer.build import finalize, initialize

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_RESET = "/reset"


class Chat:
    """A model's answers: turns in, text out.

    With a chat template every question is a user's message; without one the model continues the bare text.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: PreTrainedTokenizerBase,
        stops: Sequence[int],
        options: argparse.Namespace,
    ) -> None:
        self._engine, self._tokenizer, self._options = engine, tokenizer, options
        self._read = TurnReader(tokenizer, stops)
        self._sampling = SamplingConfig(
            temperature=options.temperature, stop_token_ids=tuple(stops), logprobs=False, top_p=options.top_p
        )
        self.has_template = getattr(tokenizer, "chat_template", None) is not None
        if options.system is not None and not self.has_template:
            raise UserError("--system: the tokenizer has no chat template to put it into")

    def answer(self, conversations: Sequence[Sequence[dict[str, str]]]) -> list[str]:
        """Return the next message of each conversation; all are decoded together.

        Raises:
            UserError: a conversation leaves no room for an answer.
        """
        return asyncio.run(self._answer(conversations))

    async def _answer(self, conversations: Sequence[Sequence[dict[str, str]]]) -> list[str]:
        requests = [self._request(number, each) for number, each in enumerate(conversations)]
        client = SessionClient(self._engine, self._sampling)
        try:
            found = await asyncio.gather(*(client.generate(each) for each in requests))
        finally:
            client.close()
        return [self._read(each.token_ids) for each in found]

    def _request(self, number: int, messages: Sequence[dict[str, str]]) -> GenerateRequest:
        if self.has_template:
            system = self._options.system
            before = [] if system is None else [{"role": "system", "content": system}]
            ids = chat_ids(self._tokenizer, [*before, *messages], add_generation_prompt=True)
        else:
            ids = list(self._tokenizer(messages[-1]["content"])["input_ids"])
        room = self._engine.max_model_len - len(ids)
        if room < 1 or not ids:
            raise UserError(
                f"question {number + 1}: {len(ids)} tokens, and the model takes 1 to "
                f"{self._engine.max_model_len - 1} of a prompt"
            )
        prompt: np.ndarray = token_ids(ids)
        new = min(room, self._options.max_new_tokens)
        return GenerateRequest(str(number), prompt, new, seed=self._options.seed + number)


def run(options: argparse.Namespace) -> int:
    """Answer the questions of standard input, or talk at a terminal."""
    check(options)
    talks = sys.stdin.isatty()
    questions = [] if talks else [line.rstrip("\n") for line in sys.stdin if line.strip()]
    if not talks and not questions:
        raise UserError("megarl chat: no question on standard input (one per line)")
    with tempfile.TemporaryDirectory(prefix="megarl-chat-") as folder, opened(options, Path(folder)) as chat:
        if talks:
            _talk(chat)
        else:
            answers = chat.answer([[{"role": "user", "content": each}] for each in questions])
            for question, answer in zip(questions, answers, strict=True):
                _print(question, answer, as_json=options.json)
    return 0


def check(options: argparse.Namespace) -> None:
    """Raise UserError for options out of range."""
    if options.max_new_tokens < 1:
        raise UserError(f"--max-new-tokens: expected an integer >= 1 (got {options.max_new_tokens})")
    if options.temperature < 0:
        raise UserError(f"--temperature: expected a number >= 0 (got {options.temperature:g})")
    if not 0 < options.top_p <= 1:
        raise UserError(f"--top-p: expected a number above 0, at most 1 (got {options.top_p:g})")


@contextmanager
def opened(options: argparse.Namespace, folder: Path) -> Iterator[Chat]:
    """Start an engine with the model's weights; ``folder`` takes its log and a converted checkpoint."""
    console = Console("eval", stream=sys.stderr)
    path = model_directory(options.model, folder, console)
    model = ModelConfig(path=path, dtype=options.dtype)
    architecture = load_architecture(path, any_family=options.backend == "hf")
    tokenizer = load_tokenizer(path)
    stops = stop_token_ids(tokenizer, path)
    longest = int(read_model_config(path)["max_position_embeddings"])
    settings = EngineConfig(backend=options.backend, kv_cache_gib=options.kv_cache_gib, max_num_seqs=64)
    with console.waiting("starting the engine's processes"):
        engine = start_engine(
            model,
            architecture,
            settings,
            max_model_len=min(longest, options.max_model_len),
            seed=options.seed,
            log_dir=folder,
            ranks=[this_machine()],
        )
    try:
        context = initialize(ParallelConfig(), options.seed)
        weights = CheckpointWeights(context, architecture, model)
        with console.waiting("waiting for the engine"):
            attach_weights(engine, architecture, weights.owners)
        engine.sync(0)
        yield Chat(engine, tokenizer, stops, options)
    finally:
        engine.shutdown()
    finalize(context)


def model_directory(named: str, folder: Path, console: Console) -> str:
    """Return the Hugging Face directory of a run (its export, or else its newest checkpoint), a checkpoint, a
    model's directory or an id of the hub.

    Raises:
        UserError: there is none.
    """
    if is_id(named):
        snapshot = resolve_id(named)
        fetch(snapshot)
        return str(snapshot)
    path = Path(named)
    if (path / "hf" / "config.json").is_file():
        return str(path / "hf")
    if is_checkpoint(path):
        if line := convert_start(path, folder):
            console.note(line)
        return str(folder / "model")
    if not (path / "config.json").is_file():
        raise UserError(f"{named}: neither a run directory nor a model (no config.json in it)")
    return named


def _talk(chat: Chat) -> None:
    print(
        f"Ctrl-D ends, {_RESET} begins anew" + ("" if chat.has_template else "; no chat template: bare text")
    )
    messages: list[dict[str, str]] = []
    while True:
        try:
            question = input("> ").strip()
        except EOFError:
            print()
            return
        if question == _RESET:
            messages = []
        elif question:
            messages.append({"role": "user", "content": question})
            try:
                [answer] = chat.answer([messages])
            except UserError as error:
                print(f"error: {error}; {_RESET} begins anew", file=sys.stderr)
                messages.pop()
                continue
            messages.append({"role": "assistant", "content": answer})
            print(printable(answer))


def _print(question: str, answer: str, *, as_json: bool) -> None:
    found: Any = {"question": question, "answer": answer}
    print(json.dumps(found) if as_json else f"> {printable(question)}\n{printable(answer)}", flush=True)
