"""Convert a rank's part of Megatron's sharded state dict to checkpoint files.

Megatron's own background saves have a manager process on every rank, and another implementation in every
version; the files are the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, is_main_replica
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess

from megarl.trainer.checkpoint_files import RankFiles
from megarl.trainer.megatron.optimizer_shards import OptimizerShards

COMMON_FILE = "common.pt"


def rank_files(
    directory: Path, state: dict[str, Any], rank: int, small: Mapping[str, Any], shards: OptimizerShards
) -> RankFiles:
    """Return a rank's files of ``state``, a sharded state dict; the first rank's common.pt is unsharded.

    ``small`` has further files by name, ``shards`` the values of tensors described without values.
    """
    sharded, common = save_preprocess(state, validate_access_integrity=False)
    files = RankFiles(directory, rank, dict(small) | ({COMMON_FILE: common} if rank == 0 else {}), _seal)
    for part in nested_values(sharded):
        if isinstance(part, ShardedTensor) and shards.holds(part):
            for offset, values in shards.pieces(part):
                files.add_piece(part.key, offset, values, part.dtype, part.global_shape)
        elif not is_main_replica(part.replica_id):  # another rank writes it
            continue
        elif isinstance(part, ShardedTensor):
            shape = (1,) * part.prepend_axis_num + tuple(part.local_shape)
            values = part.data.detach().reshape(shape)
            files.add_piece(part.key, part.global_offset, values, part.dtype, part.global_shape)
        else:
            files.add_object(part.unique_key, [part.data])
    return files


def _seal(directory: Path) -> None:
    save_config(CheckpointingConfig("torch_dist", 1), str(directory))
