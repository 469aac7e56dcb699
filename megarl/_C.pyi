"""The native extension, csrc/bindings.cpp; its ops are at torch.ops.megarl."""

import numpy as np
import numpy.typing as npt

cpu_capability: str
with_cuda: bool

def plan_microbatches(
    lengths: npt.NDArray[np.int64],
    *,
    max_tokens: int,
    num_ranks: int,
    group: int,
    equal_counts: bool,
    a: float,
    b: float,
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int64]]: ...
