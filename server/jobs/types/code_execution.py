"""CODE_EXECUTION: runs a user's program in the sandbox."""

import dataclasses
from typing import Any
from uuid import UUID

from marshmallow import ValidationError, fields, validate, validates_schema

from server import metrics, tracing
from server.errors import ValidationFailed
from server.fields import Id, Schema, camel
from server.jobs.attempt_context import AttemptContext
from server.jobs.sandbox import FilesRejectedError, ProgramLimits, ProgramResult
from server.jobs.table import JobTable
from server.jobs.workspace_files import SkippedFiles

jobs = JobTable()
MAX_CODE_CHARACTERS = 256 * 1024
MAX_STDIN_CHARACTERS = 256 * 1024
MAX_ARGUMENTS = 64


class CodeExecution(Schema):
    language = fields.String(required=True, validate=validate.OneOf(("python", "javascript", "bash")))
    code = fields.String(validate=validate.Length(1, MAX_CODE_CHARACTERS))
    document_id = Id()
    workspace_id = Id()
    stdin = fields.String(load_default="", validate=validate.Length(max=MAX_STDIN_CHARACTERS))
    args = fields.List(
        fields.String(validate=validate.Length(max=4096)),
        load_default=list,
        validate=validate.Length(max=MAX_ARGUMENTS),
    )
    timeout_seconds = fields.Integer(load_default=10, strict=True, validate=validate.Range(1, 60))
    memory_mb = fields.Integer(load_default=128, strict=True, validate=validate.Range(16, 512))

    @validates_schema
    def has_one_program(self, data: dict[str, Any], **_: Any) -> None:
        if len({"document_id", "code"} & data.keys()) != 1:
            raise ValidationError("Exactly one of code and documentId is required.", "code")


@jobs.on("CODE_EXECUTION", CodeExecution, timeout=90, required_language=lambda payload: payload["language"])
async def execute(attempt: AttemptContext, payload: dict[str, Any]) -> dict[str, Any]:
    """Run a program. A non-zero exit status or an exceeded limit is part of the result of a completed job."""
    code, workspace = payload.get("code"), attempt.record["workspaceId"]
    if code is None:
        code = await attempt.files.read_text(payload["document_id"])
    skipped = SkippedFiles()
    files = await attempt.files.load_for_sandbox(UUID(workspace), skipped.add) if workspace else {}
    language, tier = payload["language"], attempt.sandbox.tier.name
    with tracing.span("sandbox", sandbox_tier=tier, sandbox_language=language):
        try:
            outcome = await attempt.sandbox.run(
                language,
                code,
                stdin=payload["stdin"],
                args=payload["args"],
                files=files,
                limits=ProgramLimits(timeout_seconds=payload["timeout_seconds"], memory_mb=payload["memory_mb"]),
                on_output=attempt.output.add,
            )
        except FilesRejectedError as error:
            raise ValidationFailed(f"Workspace files cannot be placed in the sandbox: {error}") from error
    metrics.SANDBOX_RUNS.labels(outcome.sandbox, language, _result_label(outcome)).inc()
    result = {camel(name): value for name, value in dataclasses.asdict(outcome).items()}
    return {**result, "warnings": skipped.warnings}


def _result_label(outcome: ProgramResult) -> str:
    if outcome.timed_out:
        return "timed out"
    if outcome.out_of_memory:
        return "out of memory"
    return "killed" if outcome.signal else "succeeded" if outcome.exit_code == 0 else "failed"
