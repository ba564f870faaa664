"""The base schema and the fields that every door validates with (marshmallow).

Keys are camelCase outside and snake_case inside; unknown fields are refused; nothing is converted silently.
"""

import math
import re
import unicodedata
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime
from functools import cached_property, partial
from itertools import islice
from typing import Any
from uuid import UUID

import orjson
from marshmallow import RAISE, ValidationError, fields, validate
from marshmallow import Schema as MarshmallowSchema

from server import json
from server.errors import FieldError, ValidationFailed, invalid

JSON_OBJECT_BYTES = 16 * 1024
MOST_PROBLEMS = 50  # of one body; who makes more of them does not read them
_DIGITS = re.compile(r"[0-9]{1,19}")
# What has Unicode's Default_Ignorable_Code_Point (DerivedCoreProperties.txt) and is neither a format character nor
# combining, and the blank Braille pattern: letters and symbols by category, and yet nothing to see.
_BLANK = re.compile("[\u115f\u1160\u2065\u2800\u3164\uffa0\ufff0-\ufff8\U000e0000-\U000e0fff]")
_UUID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}", re.IGNORECASE)


def camel(name: str) -> str:
    head, *rest = name.split("_")
    return head + "".join(part.capitalize() for part in rest)


class Schema(MarshmallowSchema):
    class Meta:
        unknown = RAISE

    def on_bind_field(self, field_name: str, field_obj: fields.Field[Any]) -> None:
        if field_obj.data_key is None:
            field_obj.data_key = camel(field_name)

    def dump(self, obj: Any, *, many: bool | None = None) -> Any:
        """As marshmallow does, of rows and dictionaries only, which need no search for attributes and hooks: that took
        most of the time of a page of twenty."""
        return list(map(self._shown, obj)) if many else self._shown(obj)

    @cached_property
    def _columns(self) -> list[tuple[str, str, Callable[[Any], Any] | None]]:
        return [(name, field.data_key or name, _shower(field)) for name, field in self.dump_fields.items()]

    def _shown(self, row: Mapping[str, Any]) -> dict[str, Any]:
        shown = {}
        for name, key, show in self._columns:
            try:
                value = row[name]
            except KeyError:
                continue
            shown[key] = value if value is None or show is None else show(value)
        return shown


def _shower(field: fields.Field[Any]) -> Callable[[Any], Any] | None:
    """What makes JSON of a field's values; None where they are."""
    if isinstance(field, Ready):
        return orjson.Fragment
    if isinstance(field, fields.Nested):
        nested = field.schema
        assert isinstance(nested, Schema)
        return partial(nested.dump, many=True) if field.many else nested._shown
    if isinstance(field, fields.List):
        show = _shower(field.inner)
        return None if show is None else lambda values: list(map(show, values))
    if isinstance(field, Id | fields.String):
        return str
    if type(field) is fields.Integer:
        return int
    if isinstance(field, fields.Dict | fields.Boolean) or type(field) is fields.Raw:
        return None
    return lambda value: field._serialize(value, None, None)


class Text(fields.String):
    """A string; ``trim`` takes white space off both ends before its length is checked."""

    def __init__(self, low: int = 0, high: int | None = None, *, trim: bool = False, **options: Any) -> None:
        self.trim = trim
        super().__init__(validate=validate.Length(min=low or None, max=high), **options)

    def _deserialize(self, value: Any, attr: str | None, data: Mapping[str, Any] | None, **options: Any) -> str:
        text = super()._deserialize(value, attr, data, **options)
        return text.strip() if self.trim else text


class Name(Text):
    """A name that people read: trimmed, with a visible character, without control characters and line breaks.

    Anything else is kept as sent, such as the joiners within an emoji.
    """

    def __init__(self, low: int, high: int, **options: Any) -> None:
        super().__init__(low, high, trim=True, **options)

    def _validate(self, value: Any) -> None:
        super()._validate(value)
        if any(unicodedata.category(character) in ("Cc", "Zl", "Zp") for character in value):
            raise ValidationError("Must not contain control characters or line breaks.")
        if not any(map(_is_visible, value)):
            raise ValidationError("Must contain a visible character.")


def _is_visible(character: str) -> bool:
    """Whether it shows by itself. Unassigned ones may: emoji that are newer than Python's tables."""
    category = unicodedata.category(character)
    return category[0] not in "ZM" and category not in ("Cc", "Cf", "Cs") and not _BLANK.match(character)


class Id(fields.UUID):
    """A UUID in its canonical form; ``int``, ``bytes`` and braces are refused."""

    def _deserialize(self, value: Any, attr: str | None, data: Mapping[str, Any] | None, **options: Any) -> UUID:
        if not isinstance(value, str):
            raise self.make_error("invalid_uuid")
        parsed = parse_id(value)
        if parsed is None:
            raise self.make_error("invalid_uuid")
        return parsed


class QueryInteger(fields.Integer):
    """An integer that is given as text: ASCII digits and nothing else, where Python's ``int`` takes much more."""

    def _deserialize(self, value: Any, attr: str | None, data: Mapping[str, Any] | None, **options: Any) -> int:
        if not _DIGITS.fullmatch(value):
            raise self.make_error("invalid", input=value)
        return super()._deserialize(value, attr, data, **options)


class Time(fields.DateTime):
    """ISO 8601; outgoing in UTC with milliseconds."""

    def _serialize(self, value: datetime | str | None, attr: str | None, obj: Any, **options: Any) -> str | None:
        if isinstance(value, str):  # out of a jsonb value
            value = datetime.fromisoformat(value)
        return None if value is None else json.timestamp(value)


class Ready(fields.Nested):
    """JSON text that a statement has made in the nested schema's shape, shown as it is."""

    def _serialize(self, nested_obj: Any, attr: Any, obj: Any, **options: Any) -> Any:  # type: ignore[override]
        return None if nested_obj is None else orjson.Fragment(nested_obj)


class WebAddress(fields.Url):
    """Of a page or picture; its length is checked first: the pattern takes long on a long text."""

    def __init__(self, **options: Any) -> None:
        super().__init__(schemes={"http", "https"}, **options)

    def _validate(self, value: Any) -> None:
        validate.Length(max=2048)(value)
        super()._validate(value)


class JsonObject(fields.Dict):
    """A JSON object of at most 16 KiB."""

    def __init__(self, **options: Any) -> None:
        super().__init__(keys=fields.String(), validate=_small_enough, **options)


def _small_enough(value: dict[str, Any]) -> None:
    size = len(json.dumps(value))
    if size > JSON_OBJECT_BYTES or size + sum(map(_zeros, _floats(value))) > JSON_OBJECT_BYTES:
        raise ValidationError(f"Must be at most {JSON_OBJECT_BYTES} bytes of JSON, numbers with all their digits.")


def _zeros(number: float) -> int:
    """About as many as PostgreSQL adds when it shows the number: it writes 1e300 with 301 digits."""
    return abs(math.frexp(number)[1]) * 3 // 10


def _floats(value: Any) -> Iterator[float]:
    if isinstance(value, float):
        yield value
    elif isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _floats(inner)


def parse_id(text: str) -> UUID | None:
    """The UUID, or None where the text is none in canonical form."""
    return UUID(text) if _UUID.fullmatch(text) else None


def load(schema: MarshmallowSchema, value: Any) -> dict[str, Any]:
    """The validated value.

    Raises:
        ValidationFailed: with one entry of ``details`` a problem, not more than 50; ``field`` is a dotted path.
    """
    if not isinstance(value, dict):
        raise invalid("", "Must be a JSON object.")
    known = {field.data_key or name for name, field in schema.fields.items()}
    unknown = list(islice((name for name in value if name not in known), MOST_PROBLEMS))
    try:
        if len(unknown) == MOST_PROBLEMS:  # marshmallow would tell of all that there are
            raise ValidationError(dict.fromkeys(unknown, "Unknown field."))
        loaded: dict[str, Any] = schema.load(value)
    except ValidationError as error:
        raise ValidationFailed("Validation failed", details=_flatten(error.messages)[:MOST_PROBLEMS]) from None
    return loaded


def _flatten(messages: Any, path: str = "") -> list[FieldError]:
    if isinstance(messages, dict):
        return [
            problem
            for key, each in messages.items()
            for problem in _flatten(each, path if key == "_schema" else f"{path}.{key}" if path else str(key))
        ]
    if isinstance(messages, list):
        return [problem for each in messages for problem in _flatten(each, path)]
    return [{"field": path[:200], "message": str(messages)}]
