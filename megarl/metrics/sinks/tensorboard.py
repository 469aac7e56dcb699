"""TensorBoard."""

from __future__ import annotations

from collections.abc import Mapping

from megarl.metrics.sink import RunInfo, Sink


class TensorBoardSink(Sink):
    """Scalars in <run.dir>/tensorboard; a resumed run hides the steps it repeats."""

    def __init__(self, run: RunInfo, on: bool) -> None:
        from torch.utils.tensorboard import SummaryWriter

        first_step = 0 if run.resumed_after is None else run.resumed_after + 1
        self._writer = SummaryWriter(str(run.directory / "tensorboard"), purge_step=first_step)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Write one scalar per value and flush, so that a running TensorBoard shows it."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        """Close the event file."""
        self._writer.close()
