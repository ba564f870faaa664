"""The schemas of requests and responses about jobs."""

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from marshmallow import fields, validate

from server.fields import Id, QueryInteger, Schema, Timestamp
from server.jobs.output import MAX_JOB_CHARACTERS
from server.jobs.store import STATUSES
from server.jobs.types import JOB_TYPES
from server.rest.idempotency import KEY_PATTERN
from server.rest.pagination import MAX_LIMIT, PageQuery

_RESULT = "depends on the type; its `warnings` name the workspace files that were skipped because of their paths"


class UtcDateTime(fields.AwareDateTime):
    """A time with an offset, converted to UTC."""

    def _deserialize(self, value: Any, attr: str | None, data: Mapping[str, Any] | None, **options: Any) -> datetime:
        try:
            return super()._deserialize(value, attr, data, **options).astimezone(UTC)
        except OverflowError:  # near the minimum and maximum of datetime
            raise self.make_error("invalid", input=value, obj_type=self.OBJ_TYPE) from None


class NewJob(Schema):
    type = fields.String(required=True, validate=validate.OneOf(sorted(JOB_TYPES)))
    payload = fields.Dict(required=True, keys=fields.String())
    priority = fields.Integer(load_default=5, strict=True, validate=validate.Range(1, 10))
    project_id = Id(load_default=None, allow_none=True)
    workspace_id = Id(load_default=None, allow_none=True)
    run_at = UtcDateTime(
        load_default=None,
        allow_none=True,
        format="iso",
        metadata={"description": "the earliest start; a time in the past means now"},
    )
    idempotency_key = fields.String(load_default=None, allow_none=True, validate=validate.Regexp(KEY_PATTERN))


class JobsQuery(PageQuery):
    project_id = Id(load_default=None, metadata={"description": "lists all jobs of the project, not only yours"})
    workspace_id = Id(load_default=None, metadata={"description": "lists all jobs of the workspace, not only yours"})
    status = fields.String(load_default=None, validate=validate.OneOf(STATUSES))
    type = fields.String(load_default=None, validate=validate.OneOf(sorted(JOB_TYPES)))


class LogsQuery(Schema):
    after = QueryInteger(
        load_default=0,
        validate=validate.Range(0, MAX_JOB_CHARACTERS),
        metadata={"description": "a position in the output, in characters; the response begins there"},
    )
    cursor = QueryInteger(
        load_default=None,
        validate=validate.Range(0, MAX_JOB_CHARACTERS),
        metadata={"description": "the same as `after`, which it overrides"},
    )
    limit = QueryInteger(load_default=MAX_LIMIT, validate=validate.Range(1, MAX_LIMIT))


class LogItem(Schema):
    offset = fields.Integer(metadata={"description": "in characters, over both streams and all attempts"})
    stream = fields.String(metadata={"enum": ["stdout", "stderr"]})
    text = fields.String()
    time = Timestamp()


class Logs(Schema):
    items = fields.List(fields.Nested(LogItem))
    next_cursor = fields.String(allow_none=True, metadata={"description": "null when `complete` is true"})
    complete = fields.Boolean(metadata={"description": "the job has ended, and its output ends here"})


class UserStats(Schema):
    pending = fields.Integer()
    processing = fields.Integer()
    completed = fields.Integer()
    failed = fields.Integer()
    cancelled = fields.Integer()


class QueueStats(Schema):
    queued = fields.Integer(metadata={"description": "due jobs that wait for a worker"})
    active = fields.Integer()
    scheduled = fields.Integer(metadata={"description": "jobs with a later runAt"})
    workers = fields.Integer()


class Stats(Schema):
    user = fields.Nested(UserStats)
    queue = fields.Nested(QueueStats)


class AttemptRecord(Schema):
    attempt = fields.Integer()
    started_at = Timestamp()
    finished_at = Timestamp()
    worker_id = fields.String()
    error = fields.Dict(allow_none=True)


class Job(Schema):
    id = Id()
    type = fields.String(metadata={"example": "CODE_EXECUTION"})
    status = fields.String(metadata={"enum": list(STATUSES)})
    payload = fields.Dict()
    result = fields.Dict(allow_none=True, metadata={"description": _RESULT})
    error = fields.Dict(allow_none=True)
    progress = fields.Float(metadata={"description": "0–100"})
    priority = fields.Integer()
    attempts = fields.Integer()
    max_attempts = fields.Integer()
    idempotency_key = fields.String(allow_none=True)
    user_id = Id()
    project_id = Id(allow_none=True)
    workspace_id = Id(allow_none=True)
    created_at = Timestamp()
    updated_at = Timestamp()
    run_at = Timestamp(allow_none=True)
    started_at = Timestamp(allow_none=True)
    completed_at = Timestamp(allow_none=True)
    history = fields.List(fields.Nested(AttemptRecord))


class JobAnswer(Schema):
    job = fields.Nested(Job)
    duplicate = fields.Boolean()
