"""What people hear of jobs: the owner, wherever connected, and the workspace that a job belongs to.

Live only. Who was away reads the job and its logs.
"""

from collections.abc import Sequence
from typing import Any
from uuid import UUID

from server import json
from server.jobs import store
from server.jobs.store import Job
from server.realtime.channels import Channels

LARGEST_BYTES = 64 << 10
_LARGE = ("payload", "result")


class Announcements:
    def __init__(self, channels: Channels) -> None:
        self._channels = channels

    async def changed(self, job: Job) -> None:
        """Status or progress has changed."""
        await self._channels.tell_user(UUID(job["userId"]), "job:updated", {"job": told(job)})

    async def moved(self, job: Job) -> None:
        """The status has changed: the workspace hears it too."""
        await self.changed(job)
        if job["workspaceId"]:
            await self._channels.report(
                "JOB_UPDATED",
                workspaces=[UUID(job["workspaceId"])],
                user=UUID(job["userId"]),
                name=job["userName"],
                jobId=job["_id"],
                jobType=job["type"],
                status=job["status"],
            )

    async def output(self, job: Job, chunks: Sequence[dict[str, Any]]) -> None:
        """A program has printed."""
        for chunk in chunks:
            data = {"jobId": job["_id"], **{key: chunk[key] for key in ("stream", "offset", "text")}}
            await self._channels.tell_user(UUID(job["userId"]), "job:output", data, droppable=True)


def told(job: Job) -> Job:
    """The job as a frame can bear it: a large payload and result are left out, one reads them."""
    shown = store.shown(job)
    if len(json.dumps([job[key] for key in _LARGE])) > LARGEST_BYTES:
        return {key: value for key, value in shown.items() if key not in _LARGE}
    return shown
