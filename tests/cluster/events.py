"""Task events kept by Ray's GCS."""

from __future__ import annotations

from ray._private import state
from ray.core.generated.gcs_pb2 import TaskEvents


def recorded_tasks() -> list[str]:
    """Return the names of the tasks with events."""
    accessor = state.state._connect_and_get_accessor()
    return [TaskEvents.FromString(event).task_info.name for event in accessor.get_task_events()]
