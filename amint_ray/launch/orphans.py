"""What a trial that was stopped leaves behind in Ray, and giving it back.

Tune ends a trial by ending its process. Ray then ends the controller of the training within, whose
placement group would keep the workers and their cores until the whole job ends (ray #54305): Ray
removes a group when both its creator and the job are gone.
"""

from __future__ import annotations

import time
from typing import Any

_SECONDS_BETWEEN_LOOKS = 0.2


def free_orphans() -> list[str]:
    """Remove this job's placement groups whose creators are dead; their workers end.

    Returns:
        The groups' ids.
    """
    import ray
    from ray.core.generated.gcs_pb2 import PlacementGroupTableData
    from ray.util.placement_group import PlacementGroup, remove_placement_group

    freed = []
    for group in _groups():
        creator = ray.ActorID(group.creator_actor_id)
        alive = creator.is_nil() or not group.creator_actor_dead  # nil: the driver made it
        if alive or group.state == PlacementGroupTableData.REMOVED:
            continue
        identity = ray.PlacementGroupID(group.placement_group_id)
        remove_placement_group(PlacementGroup(identity))
        freed.append(identity.hex())
    return freed


def free_all(seconds: float) -> None:
    """The same until the job has no placement group left, which may take Ray a moment to see.

    Args:
        seconds: that are waited at most.
    """
    from ray.core.generated.gcs_pb2 import PlacementGroupTableData

    deadline = time.monotonic() + seconds
    while True:
        free_orphans()
        left = [group for group in _groups() if group.state != PlacementGroupTableData.REMOVED]
        if not left or time.monotonic() > deadline:
            return
        time.sleep(_SECONDS_BETWEEN_LOOKS)


def _groups() -> list[Any]:
    """Of this job, as Ray's control service has them; the public table leaves out who made them."""
    import ray
    from ray._private.state import state
    from ray.core.generated.gcs_pb2 import PlacementGroupTableData

    job = ray.get_runtime_context().get_job_id()
    raw = state._connect_and_get_accessor().get_placement_group_table()
    tables = [PlacementGroupTableData.FromString(data) for data in raw]
    return [table for table in tables if table.creator_job_id.hex() == job]
