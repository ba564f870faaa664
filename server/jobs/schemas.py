"""What jobs look like from outside."""

from marshmallow import fields, validate

from server.fields import Id, Schema, Time
from server.jobs.types import JOB_TYPES


class NewJob(Schema):
    type = fields.String(required=True, validate=validate.OneOf(sorted(JOB_TYPES)))
    payload = fields.Dict(required=True, keys=fields.String())
    priority = fields.Integer(load_default=5, strict=True, validate=validate.Range(1, 10))
    project_id = Id(load_default=None, allow_none=True)
    workspace_id = Id(load_default=None, allow_none=True)
    run_at = fields.AwareDateTime(load_default=None, allow_none=True, format="iso")
    idempotency_key = fields.String(load_default=None, allow_none=True, validate=validate.Length(1, 255))


class AttemptRecord(Schema):
    attempt = fields.Integer()
    started_at = Time()
    finished_at = Time()
    worker_id = fields.String()
    error = fields.Dict(allow_none=True)


class Job(Schema):
    id = Id()
    type = fields.String()
    status = fields.String(metadata={"enum": ["pending", "processing", "completed", "failed", "cancelled"]})
    payload = fields.Dict()
    result = fields.Dict(allow_none=True)
    error = fields.Dict(allow_none=True)
    progress = fields.Float(metadata={"description": "0–100"})
    priority = fields.Integer()
    attempts = fields.Integer()
    max_attempts = fields.Integer()
    idempotency_key = fields.String(allow_none=True)
    user_id = Id()
    project_id = Id(allow_none=True)
    workspace_id = Id(allow_none=True)
    created_at = Time()
    updated_at = Time()
    run_at = Time(allow_none=True)
    started_at = Time(allow_none=True)
    completed_at = Time(allow_none=True)
    history = fields.List(fields.Nested(AttemptRecord))


class JobAnswer(Schema):
    job = fields.Nested(Job)
    duplicate = fields.Boolean()
