"""Realtime events about jobs: for the owner on every connection, and for the workspace of the job.

Events are live only. A client that was disconnected reads the job and its logs.
"""

from collections.abc import Sequence
from typing import Any
from uuid import UUID

from server import json
from server.jobs import store
from server.jobs.store import JobRecord
from server.realtime.channels import Channels

MAX_EMBEDDED_BYTES = 64 << 10
_LARGE_FIELDS = ("payload", "result")


class Announcements:
    """The publisher of job events."""

    def __init__(self, channels: Channels) -> None:
        self._channels = channels

    async def announce_update(self, job: JobRecord) -> None:
        """Send the owner the job after a change of its status or progress."""
        await self._channels.push_to_user(UUID(job["userId"]), "job:updated", {"job": frame_view(job)})

    async def announce_status(self, job: JobRecord) -> None:
        """Send the job to its owner and the new status to its workspace."""
        await self.announce_update(job)
        if job["workspaceId"]:
            await self._channels.announce_committed(
                "JOB_UPDATED",
                workspaces=[UUID(job["workspaceId"])],
                user=UUID(job["userId"]),
                name=job["userName"],
                jobId=job["_id"],
                jobType=job["type"],
                status=job["status"],
            )

    async def announce_output(self, job: JobRecord, chunks: Sequence[dict[str, Any]]) -> None:
        """Send the owner new output of the program; backpressure may drop it."""
        for chunk in chunks:
            data = {"jobId": job["_id"], **{key: chunk[key] for key in ("stream", "offset", "text")}}
            await self._channels.push_to_user(UUID(job["userId"]), "job:output", data, droppable=True)


def frame_view(job: JobRecord) -> JobRecord:
    """Return the job for a frame, without payload and result if they are large: clients read them over REST."""
    shown = store.client_view(job)
    if len(json.dumps([job[key] for key in _LARGE_FIELDS])) > MAX_EMBEDDED_BYTES:
        return {key: value for key, value in shown.items() if key not in _LARGE_FIELDS}
    return shown
