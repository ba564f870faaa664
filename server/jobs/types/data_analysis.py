"""DATA_ANALYSIS: what is in a table."""

import asyncio
from pathlib import Path
from typing import Any

import orjson
from marshmallow import ValidationError, fields, validate, validates_schema

from server.errors import ValidationFailed
from server.fields import Id, Schema
from server.jobs import analysis, children
from server.jobs.attempt import Attempt
from server.jobs.table import JobTable

jobs = JobTable()
PROGRAM = Path(analysis.__file__)


class DataAnalysis(Schema):
    document_id = Id()
    content = fields.String(validate=validate.Length(min=1))
    format = fields.String(required=True, validate=validate.OneOf(sorted(analysis.READ)))

    @validates_schema
    def has_one_source(self, data: dict[str, Any], **_: Any) -> None:
        if len({"document_id", "content"} & data.keys()) != 1:
            raise ValidationError("Give either documentId or content.", "documentId")


@jobs.on("DATA_ANALYSIS", DataAnalysis, timeout=120)
async def analyse(attempt: Attempt, payload: dict[str, Any]) -> dict[str, Any]:
    """Describe a table: its columns, how they hang together, what stands out."""
    content = payload.get("content")
    if content is None:
        content = await attempt.files.text(payload["document_id"])
    async with attempt.sandbox.folder() as folder:
        path = folder / "data"
        await asyncio.to_thread(path.write_text, content, encoding="utf-8", errors="replace")
        del content
        answer = await children.run(PROGRAM, str(path), payload["format"], cwd=folder, progress=attempt.progress)
    told: dict[str, Any] = orjson.loads(answer)
    if "refused" in told:
        raise ValidationFailed(told["refused"])
    return told
