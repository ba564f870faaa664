"""Schemas serialize rows as marshmallow does, only faster."""

from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

import marshmallow
import pytest
from marshmallow import fields

import server.app  # noqa: F401 - all schemas
from server import json
from server.auth.schemas import Person
from server.fields import Id, RawJson, Schema
from server.projects.schemas import Activity

NOW = datetime(2026, 1, 2, 3, 4, 5, 6000, UTC)
ID = UUID("11111111-2222-4333-8444-555555555555")


def schemas(of: type[Schema] = Schema) -> Iterator[type[Schema]]:
    for schema in of.__subclasses__():
        if schema.__module__.startswith("server."):
            yield schema
        yield from schemas(schema)


PLAIN: dict[type, Any] = {
    RawJson: '{"name":"Ada"}',
    Id: ID,
    fields.DateTime: NOW,
    fields.Integer: 3,
    fields.Float: 2.5,
    fields.Boolean: True,
    fields.Dict: {"a": [1, None]},
}


def sample(field: Any) -> Any:
    """Return a value of a field as a store returns it."""
    for kind, value in PLAIN.items():
        if isinstance(field, kind):
            return value
    match field:
        case fields.Nested():
            row = {name: sample(nested) for name, nested in field.schema.fields.items()}
            return [row, row] if field.many else row
        case fields.List():
            return [sample(field.inner)] * 2
        case fields.Constant():
            return field.constant
    return "text"


@pytest.mark.parametrize("kind", list(schemas()), ids=lambda kind: kind.__name__)
def test_row_is_serialized_as_marshmallow_serializes_it(kind: type[Schema]) -> None:
    schema = kind()
    full = {name: sample(field) for name, field in schema.fields.items()}
    nulls = {name: None for name, field in schema.fields.items() if not isinstance(field, fields.Constant)}
    for row in (full, full | nulls, full | {"besides": 1}):
        assert json.dumps(schema.dump(row)) == json.dumps(marshmallow.Schema.dump(schema, row))
    expected = marshmallow.Schema.dump(schema, [full, full], many=True)
    assert json.dumps(schema.dump([full, full], many=True)) == json.dumps(expected)


def test_activity_id_is_serialized_as_a_string() -> None:
    assert Activity().dump({"id": 346}) == {"id": "346"}  # not all clients have 64-bit numbers


def test_missing_column_is_omitted() -> None:
    assert Person().dump({"name": "Ada"}) == {"name": "Ada"}
