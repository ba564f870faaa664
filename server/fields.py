"""The base schema and the fields that all transports validate with (marshmallow).

Keys are camelCase outside and snake_case inside; unknown fields are rejected; values are never converted silently.
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
from server.errors import FieldError, ValidationFailed, invalid_field

MAX_JSON_OBJECT_BYTES = 16 * 1024
MAX_VALIDATION_ERRORS = 50  # of one body: clients do not read more
_DIGITS = re.compile(r"[0-9]{1,19}")
# Characters with Unicode's Default_Ignorable_Code_Point (DerivedCoreProperties.txt) that are neither format characters
# nor combining, and the blank Braille pattern: letters and symbols by category, but invisible.
_INVISIBLE = re.compile("[\u115f\u1160\u2065\u2800\u3164\uffa0\ufff0-\ufff8\U000e0000-\U000e0fff]")
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
        """Serialize as marshmallow does, but rows and dictionaries only.

        They need no search for attributes and hooks, which took most of the time of a page of twenty.
        """
        return list(map(self._dump_row, obj)) if many else self._dump_row(obj)

    @cached_property
    def _serializers(self) -> list[tuple[str, str, Callable[[Any], Any] | None]]:
        return [(name, field.data_key or name, _serializer_of(field)) for name, field in self.dump_fields.items()]

    def _dump_row(self, row: Mapping[str, Any]) -> dict[str, Any]:
        values = {}
        for name, key, serialize in self._serializers:
            try:
                value = row[name]
            except KeyError:
                continue
            values[key] = value if value is None or serialize is None else serialize(value)
        return values


def _serializer_of(field: fields.Field[Any]) -> Callable[[Any], Any] | None:
    """Return the function that serializes the values of a field, or None if they are JSON already."""
    if isinstance(field, RawJson):
        return orjson.Fragment
    if isinstance(field, fields.Nested):
        nested = field.schema
        assert isinstance(nested, Schema)
        return partial(nested.dump, many=True) if field.many else nested._dump_row
    if isinstance(field, fields.List):
        serialize = _serializer_of(field.inner)
        return None if serialize is None else lambda values: list(map(serialize, values))
    if isinstance(field, Id | fields.String):
        return str
    if type(field) is fields.Integer:
        return int
    if isinstance(field, fields.Dict | fields.Boolean) or type(field) is fields.Raw:
        return None
    return lambda value: field._serialize(value, None, None)


class Text(fields.String):
    """A string; ``trim`` takes white space off both ends before its length is checked."""

    def __init__(
        self, min_length: int = 0, max_length: int | None = None, *, trim: bool = False, **options: Any
    ) -> None:
        self.trim = trim
        super().__init__(validate=validate.Length(min=min_length or None, max=max_length), **options)

    def _deserialize(self, value: Any, attr: str | None, data: Mapping[str, Any] | None, **options: Any) -> str:
        text = super()._deserialize(value, attr, data, **options)
        return text.strip() if self.trim else text


class Name(Text):
    """A display name: trimmed, with a visible character, without control characters and line breaks.

    All other characters stay as sent, such as the joiners within an emoji.
    """

    def __init__(self, min_length: int, max_length: int, **options: Any) -> None:
        super().__init__(min_length, max_length, trim=True, **options)

    def _validate(self, value: Any) -> None:
        super()._validate(value)
        if any(unicodedata.category(character) in ("Cc", "Zl", "Zp") for character in value):
            raise ValidationError("Must not contain control characters or line breaks.")
        if not any(map(_is_visible, value)):
            raise ValidationError("Must contain a visible character.")


def _is_visible(character: str) -> bool:
    """Return whether a character is visible by itself. Unassigned ones count: emoji newer than Python's tables."""
    category = unicodedata.category(character)
    return category[0] not in "ZM" and category not in ("Cc", "Cf", "Cs") and not _INVISIBLE.match(character)


class Id(fields.UUID):
    """A UUID in its canonical form; ``int``, ``bytes`` and braces are rejected."""

    def _deserialize(self, value: Any, attr: str | None, data: Mapping[str, Any] | None, **options: Any) -> UUID:
        if not isinstance(value, str):
            raise self.make_error("invalid_uuid")
        parsed = parse_id(value)
        if parsed is None:
            raise self.make_error("invalid_uuid")
        return parsed


class QueryInteger(fields.Integer):
    """An integer in text form: ASCII digits only, while Python's ``int`` accepts much more."""

    def _deserialize(self, value: Any, attr: str | None, data: Mapping[str, Any] | None, **options: Any) -> int:
        if not _DIGITS.fullmatch(value):
            raise self.make_error("invalid", input=value)
        return super()._deserialize(value, attr, data, **options)


class Timestamp(fields.DateTime):
    """A timestamp in ISO 8601; responses have UTC with milliseconds."""

    def _serialize(self, value: datetime | str | None, attr: str | None, obj: Any, **options: Any) -> str | None:
        if isinstance(value, str):  # from a jsonb value
            value = datetime.fromisoformat(value)
        return None if value is None else json.format_timestamp(value)


class RawJson(fields.Nested):
    """JSON text that a statement built in the shape of the nested schema; passed on unchanged."""

    def _serialize(self, nested_obj: Any, attr: Any, obj: Any, **options: Any) -> Any:  # type: ignore[override]
        return None if nested_obj is None else orjson.Fragment(nested_obj)


class HttpUrl(fields.Url):
    """An http(s) URL. Its length is checked first, because the pattern takes long on a long text."""

    def __init__(self, **options: Any) -> None:
        super().__init__(schemes={"http", "https"}, **options)

    def _validate(self, value: Any) -> None:
        validate.Length(max=2048)(value)
        super()._validate(value)


class JsonObject(fields.Dict):
    """A JSON object of at most 16 KiB."""

    def __init__(self, **options: Any) -> None:
        super().__init__(keys=fields.String(), validate=_check_json_size, **options)


def _check_json_size(value: dict[str, Any]) -> None:
    size = len(json.dumps(value))
    if size > MAX_JSON_OBJECT_BYTES or size + sum(map(_expanded_digits, _floats(value))) > MAX_JSON_OBJECT_BYTES:
        raise ValidationError(
            f"Must not exceed {MAX_JSON_OBJECT_BYTES >> 10} KiB of JSON, with numbers written out in full."
        )


def _expanded_digits(number: float) -> int:
    """Return about how many digits PostgreSQL adds when it prints the number: it writes 1e300 with 301 digits."""
    return abs(math.frexp(number)[1]) * 3 // 10


def _floats(value: Any) -> Iterator[float]:
    if isinstance(value, float):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _floats(item)


def parse_id(text: str) -> UUID | None:
    """Return the UUID, or None if the text is not a UUID in canonical form."""
    return UUID(text) if _UUID.fullmatch(text) else None


def load(schema: MarshmallowSchema, value: Any) -> dict[str, Any]:
    """Return the validated value.

    Raises:
        ValidationFailed: ``details`` has an entry for each problem, at most 50; ``field`` is a dotted path.
    """
    if not isinstance(value, dict):
        raise invalid_field("", "Must be a JSON object.")
    known = {field.data_key or name for name, field in schema.fields.items()}
    unknown = list(islice((name for name in value if name not in known), MAX_VALIDATION_ERRORS))
    try:
        if len(unknown) == MAX_VALIDATION_ERRORS:  # marshmallow would report all of them
            raise ValidationError(dict.fromkeys(unknown, "Unknown field."))
        loaded: dict[str, Any] = schema.load(value)
    except ValidationError as error:
        raise ValidationFailed("Validation failed", details=_flatten(error.messages)[:MAX_VALIDATION_ERRORS]) from None
    return loaded


def _flatten(messages: Any, path: str = "") -> list[FieldError]:
    if isinstance(messages, dict):
        return [
            problem
            for key, nested in messages.items()
            for problem in _flatten(nested, path if key == "_schema" else f"{path}.{key}" if path else str(key))
        ]
    if isinstance(messages, list):
        return [problem for nested in messages for problem in _flatten(nested, path)]
    return [{"field": path[:200], "message": str(messages)}]
