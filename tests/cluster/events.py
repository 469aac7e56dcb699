"""What Ray's GCS keeps about tasks."""

from __future__ import annotations

from ray._private import state
from ray.core.generated.gcs_pb2 import TaskEvents


def recorded_tasks() -> list[str]:
    """Names of the tasks it has events of."""
    accessor = state.state._connect_and_get_accessor()
    return [TaskEvents.FromString(event).task_info.name for event in accessor.get_task_events()]
