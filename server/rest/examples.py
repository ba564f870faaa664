"""Examples for the OpenAPI document: those of a schema, else examples derived from its names, formats and types."""

from typing import Any

ID = "0b9d2c3e-5a41-4f6e-9c1d-7e8f90a1b2c3"
TIME = "2026-01-05T12:00:00.000Z"
_BY_FORMAT = {
    "uuid": ID,
    "date-time": TIME,
    "url": "https://example.org/ada.png",
}
_BY_NAME = {
    "accessToken": "eyJhbGciOiJIUzI1NiIsImtpZCI6IjQ0ZWQ4YyJ9.eyJzdWIiOiIwYjlkMmMzZSJ9.Vq0W7h",
    "refreshToken": "2l8WmWmS0Wc1nUuXb6c2H0cP4n1s9y7VwD3oRkE5tJg",
    "token": "Yb0tq3mV6xkJ9sR1zL4nWc8uP2hD7fGe5aTiKoXyQwE",
    "invitationToken": "Yb0tq3mV6xkJ9sR1zL4nWc8uP2hD7fGe5aTiKoXyQwE",
    "ticket": "p9K2vX5sQ8wE1rT4yU7iO0aS3dF6gH9jZcLxMbNqWeR",
    "requestId": "5f2b8c1e9a7d4c3b8e6f0a1b2c3d4e5f",
    "error": "Email already registered",
    "email": "ada@example.org",
    "avatarUrl": "https://example.org/ada.png",
    "userName": "Ada Lovelace",
    "description": "Weaves algebraical patterns",
    "userAgent": "Mozilla/5.0 (X11; Linux x86_64) Firefox/145.0",
    "ip": "192.0.2.1",
    "id": "1815",
    "path": "src/main.py",
    "mimeType": "text/x-python",
    "content": "print('Hello')",
    "text": "Hello",
    "idempotencyKey": "order-1815",
    "workerId": "worker-1",
    "nextCursor": "WyJwcm9qZWN0cyBieSAtdXBkYXRlZEF0Il0",
    "expiresIn": 900,
}
_BY_TYPE: dict[str, Any] = {"integer": 1, "number": 0.5, "boolean": True, "object": {}}


def add_examples(document: dict[str, Any]) -> None:
    """Add an example to every property of every definition, and to every successful response with a body."""
    definitions = document["definitions"]
    for definition in definitions.values():
        for name, schema in definition.get("properties", {}).items():
            if schema.get("type") not in (None, "array", "object"):
                schema.setdefault("example", example_for(schema, definitions, name))
    for operation in (operation for methods in document["paths"].values() for operation in methods.values()):
        for status, response in operation["responses"].items():
            if status.startswith("2") and "schema" in response:
                response["examples"] = {"application/json": example_for(response["schema"], definitions)}


def example_for(schema: dict[str, Any], definitions: dict[str, Any], name: str = "text") -> Any:
    """Return a value that fits the schema; ``name`` is the name of the property."""
    if "example" in schema:
        return schema["example"]
    if "enum" in schema:
        return schema["enum"][0]
    if "$ref" in schema:
        return example_for(definitions[schema["$ref"].rpartition("/")[2]], definitions)
    if "properties" in schema:
        return {key: example_for(inner, definitions, key) for key, inner in schema["properties"].items()}
    if schema.get("type") == "array":
        return [example_for(schema["items"], definitions, name)]
    if schema.get("format") in _BY_FORMAT:
        return _BY_FORMAT[schema["format"]]
    return _BY_NAME.get(name, _BY_TYPE.get(schema.get("type", ""), name))
