"""What schemas show of a row: what marshmallow would, only sooner."""

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
from server.fields import Id, Ready, Schema
from server.projects.schemas import Activity

NOW = datetime(2026, 1, 2, 3, 4, 5, 6000, UTC)
ID = UUID("11111111-2222-4333-8444-555555555555")


def schemas(of: type[Schema] = Schema) -> Iterator[type[Schema]]:
    for each in of.__subclasses__():
        if each.__module__.startswith("server."):
            yield each
        yield from schemas(each)


PLAIN: dict[type, Any] = {
    Ready: '{"name":"Ada"}',
    Id: ID,
    fields.DateTime: NOW,
    fields.Integer: 3,
    fields.Float: 2.5,
    fields.Boolean: True,
    fields.Dict: {"a": [1, None]},
}


def sample(field: Any) -> Any:
    """A value as a store returns it."""
    for kind, value in PLAIN.items():
        if isinstance(field, kind):
            return value
    match field:
        case fields.Nested():
            row = {name: sample(inner) for name, inner in field.schema.fields.items()}
            return [row, row] if field.many else row
        case fields.List():
            return [sample(field.inner)] * 2
        case fields.Constant():
            return field.constant
    return "text"


@pytest.mark.parametrize("kind", list(schemas()), ids=lambda kind: kind.__name__)
def test_a_row_is_shown_as_marshmallow_shows_it(kind: type[Schema]) -> None:
    schema = kind()
    full = {name: sample(field) for name, field in schema.fields.items()}
    gaps = {name: None for name, field in schema.fields.items() if not isinstance(field, fields.Constant)}
    for row in (full, full | gaps, full | {"besides": 1}):
        assert json.dumps(schema.dump(row)) == json.dumps(marshmallow.Schema.dump(schema, row))
    of_many = marshmallow.Schema.dump(schema, [full, full], many=True)
    assert json.dumps(schema.dump([full, full], many=True)) == json.dumps(of_many)


def test_a_number_that_is_shown_as_a_text_is_one() -> None:
    assert Activity().dump({"id": 346}) == {"id": "346"}  # beyond what every client's numbers hold


def test_what_a_row_lacks_is_not_shown() -> None:
    assert Person().dump({"name": "Ada"}) == {"name": "Ada"}
