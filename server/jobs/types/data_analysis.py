"""DATA_ANALYSIS: describes a table, in a helper process."""

import asyncio
from pathlib import Path
from typing import Any

import orjson
from marshmallow import ValidationError, fields, validate, validates_schema

from server.errors import ValidationFailed
from server.fields import Id, Schema
from server.jobs import analysis_process, helper_process
from server.jobs.attempt_context import AttemptContext
from server.jobs.table import JobTable

jobs = JobTable()
PROGRAM = Path(analysis_process.__file__)


class DataAnalysis(Schema):
    document_id = Id()
    content = fields.String(validate=validate.Length(min=1))
    format = fields.String(required=True, validate=validate.OneOf(sorted(analysis_process.READERS)))

    @validates_schema
    def has_one_source(self, data: dict[str, Any], **_: Any) -> None:
        if len({"document_id", "content"} & data.keys()) != 1:
            raise ValidationError("Exactly one of documentId and content is required.", "documentId")


@jobs.on("DATA_ANALYSIS", DataAnalysis, timeout=120)
async def analyze(attempt: AttemptContext, payload: dict[str, Any]) -> dict[str, Any]:
    """Describe a table: its columns, their correlations and remarkable values."""
    content = payload.get("content")
    if content is None:
        content = await attempt.files.read_text(payload["document_id"])
    async with attempt.sandbox.temporary_directory() as folder:
        path = folder / "data"
        await asyncio.to_thread(path.write_text, content, encoding="utf-8", errors="replace")
        del content
        output = await helper_process.run(
            PROGRAM, str(path), payload["format"], cwd=folder, on_progress=attempt.report_progress
        )
    result: dict[str, Any] = orjson.loads(output)
    if "rejected" in result:
        raise ValidationFailed(result["rejected"])
    return result
