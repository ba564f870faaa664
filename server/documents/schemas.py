"""What documents look like from outside."""

from collections.abc import Mapping
from typing import Any

from marshmallow import ValidationError, fields, validate

from server.documents.paths import normalize, problem_with
from server.fields import Id, Schema, Timestamp


def _is_path(path: str) -> None:
    problem = problem_with(path)
    if problem:
        raise ValidationError(problem)


class Path(fields.String):
    """A path of a document, normalized to Unicode NFC."""

    def __init__(self, **options: Any) -> None:
        description = "relative; no . or .. segments, backslashes or control characters; normalized to Unicode NFC"
        super().__init__(validate=_is_path, metadata={"example": "src/main.py", "description": description}, **options)

    def _deserialize(self, value: Any, attr: str | None, data: Mapping[str, Any] | None, **options: Any) -> str:
        return normalize(super()._deserialize(value, attr, data, **options))


class Document(Schema):
    id = Id()
    workspace_id = Id()
    path = fields.String()
    mime_type = fields.String()
    size = fields.Integer(metadata={"description": "size of the text in bytes"})
    version = fields.Integer(metadata={"description": "grows with every edit"})
    created_at = Timestamp()
    updated_at = Timestamp()
    updated_by = Id(allow_none=True, metadata={"description": "the user who edited it last"})


class NewDocument(Schema):
    path = Path(required=True)
    content = fields.String(load_default="")


class DocumentChange(Schema):
    path = Path(required=True)


class Restoration(Schema):
    version = fields.Integer(required=True, strict=True, validate=validate.Range(1, 2**53))


class Version(Schema):
    version = fields.Integer()
    cause = fields.String(metadata={"enum": ["created", "pause", "put", "restore"]})
    size = fields.Integer()
    created_at = Timestamp()
    created_by = Id(allow_none=True)


class VersionWithContent(Version):
    content = fields.String()
