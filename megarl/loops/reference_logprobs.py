"""Reference logprobs of a preference run: of all its sequences before the first step, or of each step's.

All of them are read from the cache or computed once. Those of a stream, whose sequences nobody knows before
they are drawn, are computed in every step with a frozen copy of the start weights.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from contextlib import nullcontext
from pathlib import Path

import torch

from megarl.cluster.collectives import from_first_rank
from megarl.config.preference import DpoConfig
from megarl.errors import UserError
from megarl.loops.reference_cache import CacheError, ReferenceCache, model_digest, sequence_digest
from megarl.models import load_architecture
from megarl.models.table import Architecture
from megarl.records import TokenSequence, TrainBatch
from megarl.runs.training_run import Interrupted, TrainingRun
from megarl.trainer.interface import Trainer
from megarl.trainer.passes import sequence_logprobs

_CHUNK = 64  # sequences per data-parallel rank between two checks of signals and the clock
_SAVE_SECONDS = 60.0


class ReferenceLogprobs:
    """Summed reference logprobs by sequence, the same on every rank.

    Every rank calls every method, with the same sequences; only rank 0 accesses the disk.
    """

    def __init__(
        self, config: DpoConfig, run: TrainingRun, policy: Trainer, architecture: Architecture
    ) -> None:
        """Hash the reference model; ``policy`` must still hold the weights of ``model.path``.

        Raises:
            UserError: the two models' architectures differ.
        """
        self._run, self._policy = run, policy
        self._path = config.reference.path or config.model.path
        self._is_own = Path(self._path) == Path(config.model.path)
        any_family = config.trainer.any_family
        theirs = architecture if self._is_own else load_architecture(self._path, any_family=any_family)
        if theirs.spec != architecture.spec:
            raise UserError(
                f"reference.path: {self._path} has a different architecture than {config.model.path}"
            )
        self.model: str = from_first_rank(lambda: model_digest(self._path, config.model.dtype))
        directory = config.reference.cache_dir or run.directory.path / "reference"
        self._cache = ReferenceCache(Path(directory), self.model)
        self._chunk = _CHUNK * config.parallel.data_parallel_size
        self._logps: dict[bytes, float] = {}

    def __call__(self, batch: TrainBatch) -> torch.Tensor:
        """Return the summed logprobs [S] float64 of prepared sequences."""
        return torch.tensor([self._logps[sequence_digest(s)] for s in batch], dtype=torch.float64)

    def prepare(self, sequences: Iterable[TokenSequence]) -> dict[str, float]:
        """Read the logprobs of all ``sequences`` from the cache or compute them; log how many of each.

        Returns the numbers of read and computed sequences, and the seconds it took. Computed logprobs are
        saved every minute, so an interrupted run resumes from there.
        """
        started = time.perf_counter()
        wanted = {sequence_digest(s): s for s in sequences}
        kept: dict[bytes, float] = {}  # on rank 0 the whole cache file, other runs' sequences included

        def read_wanted() -> dict[bytes, float]:
            kept.update(self._read())
            return {digest: kept[digest] for digest in wanted if digest in kept}

        self._logps = from_first_rank(read_wanted)
        read, missing = len(self._logps), [d for d in wanted if d not in self._logps]
        if missing:
            weights = nullcontext() if self._is_own else self._policy.weights_of(self._path)
            with weights, self._run.console.progress("reference logprobs", len(missing)) as advance:
                saved = time.monotonic()
                for start in range(0, len(missing), self._chunk):
                    chunk = missing[start : start + self._chunk]
                    self._compute(chunk, [wanted[digest] for digest in chunk])
                    advance(len(chunk))
                    number = self._run.signal_number()
                    if number is not None or time.monotonic() - saved > _SAVE_SECONDS:
                        self._write(kept)
                        saved = time.monotonic()
                    if number is not None:
                        self._run.console.note("Stopped; the same command resumes from here")
                        raise Interrupted(128 + number)
            self._write(kept)
        source = f"read from {self._cache.path}" if read else "read"
        self._run.console.note(
            f"reference logprobs of {self._path}: {read} sequences {source}, {len(missing)} computed"
        )
        return {"read": read, "computed": len(missing), "seconds": time.perf_counter() - started}

    def check_same_model(self, earlier: str) -> None:
        """Raise UserError unless the reference is the one the run began with (``model`` of its state)."""
        field = "model.path" if self._is_own else "reference.path"
        _check_same_model(field, self._path, earlier, self.model)

    def _compute(self, digests: list[bytes], sequences: list[TokenSequence]) -> None:
        batch = TrainBatch.of(sequences)
        values = _finite(sequence_logprobs(self._policy, batch), batch, self._path)
        self._logps |= dict(zip(digests, values.tolist(), strict=True))

    def _read(self) -> dict[bytes, float]:
        try:
            return self._cache.read()
        except CacheError as error:
            self._run.console.warn(
                f"reference logprobs: {self._cache.path} is not used, {error}; it is written anew"
            )
            return {}

    def _write(self, kept: dict[bytes, float]) -> None:
        """Save this run's logprobs together with the file's others (sequences of other runs)."""
        if self._run.is_first:
            self._cache.write(kept | self._logps)


class StepReference:
    """Summed reference logprobs of the sequences of a step, the same on every rank.

    The reference is a frozen copy of the weights that the policy has now (with LoRA, the policy without its
    adapters).
    """

    def __init__(self, config: DpoConfig, policy: Trainer) -> None:
        """Keep the reference; ``policy`` must still hold the weights of ``model.path``."""
        self._policy, self._path = policy, config.model.path
        self.model: str = from_first_rank(lambda: model_digest(self._path, config.model.dtype))
        policy.keep_reference()

    def __call__(self, batch: TrainBatch) -> torch.Tensor:
        """Return the summed logprobs [S] float64 of sequences; every rank calls it with the same ones.

        Raises:
            UserError: one of them is not finite.
        """
        with self._policy.reference():
            return _finite(sequence_logprobs(self._policy, batch), batch, self._path)

    def check_same_model(self, earlier: str) -> None:
        """Raise UserError unless the reference is the one the run began with (``model`` of its state)."""
        _check_same_model("model.path", self._path, earlier, self.model)


def _finite(values: torch.Tensor, batch: TrainBatch, path: str) -> torch.Tensor:
    for value, sequence in zip(values.tolist(), batch, strict=True):
        if not math.isfinite(value):
            raise UserError(
                f"{path}: the reference's logprob of a response is {value} (its prompt begins with token ids "
                f"{sequence.token_ids[:8].tolist()})"
            )
    return values


def _check_same_model(field: str, path: str, earlier: str, now: str) -> None:
    if earlier != now:
        raise UserError(
            f"{field}: {path} holds other weights than when this run began; restore them or choose another "
            "run.dir"
        )
