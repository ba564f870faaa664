"""AsyncAPI 3 document of the socket, built from the tables of messages and events, and its HTML page.

Nothing is described twice: shapes come from the schemas that validate what clients send.
"""

import html
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from apispec import APISpec
from apispec.ext.marshmallow.openapi import OpenAPIConverter
from marshmallow import Schema

from server import __version__, json
from server.realtime.events import PUSHES, Push
from server.realtime.table import MessageDef

DOCUMENT_PATH = "/api-docs/asyncapi.json"
PAGE_PATH = "/api-docs/realtime"
CLOSE_CODES = {
    1009: "frame exceeds the maximum size",
    1011: "internal server error; reconnect",
    1012: "the server restarts; reconnect",
    1013: "the server is overloaded, or the client reads too slowly; reconnect",
    4400: "protocol error: too many frames, or too many malformed frames",
    4401: "unauthenticated, or the token has expired",
    4403: "access denied; on /yjs only",
    4408: "authentication or heartbeat timed out",
}
RoleOf = Callable[[MessageDef], str | None]
Json = dict[str, Any]
_ID = {"type": ["string", "number"], "description": "chosen by the client; the reply repeats it"}


def document(messages: Mapping[str, MessageDef], *, role_of: RoleOf) -> Json:
    """Return the document; ``role_of`` returns the minimum role of a message, or None if it needs no role."""
    client_messages = {
        _name(message.event): _client_message(message, role_of(message)) for message in messages.values()
    }
    acks = {f"{_name(message.event)}.ack": _ack_message(message) for message in messages.values()}
    pushes = {push_name(push): _push_message(push) for push in PUSHES}
    return {
        "asyncapi": "3.0.0",
        "info": {
            "title": "Collaborative Workspace Backend: realtime",
            "version": __version__,
            "description": _DESCRIPTION,
        },
        "defaultContentType": "application/json",
        "channels": {
            "socket": {
                "address": "/ws",
                "messages": {name: _ref("components/messages", name) for name in (*client_messages, *acks, *pushes)},
                "bindings": {"ws": {"method": "GET", "query": _QUERY}},
            }
        },
        "operations": {
            **{_name(message.event): _operation(message) for message in messages.values()},
            "push": {
                "action": "send",
                "channel": _ref("channels", "socket"),
                "summary": "Receive the frames that the server sends unasked",
                "messages": [_ref("channels/socket/messages", name) for name in pushes],
            },
        },
        "components": {
            "messages": client_messages | acks | pushes,
            "securitySchemes": {"bearer": {"type": "http", "scheme": "bearer", "bearerFormat": "JWT"}},
        },
    }


def _operation(message: MessageDef) -> Json:
    name = _name(message.event)
    return {
        "action": "receive",
        "channel": _ref("channels", "socket"),
        "summary": message.summary,
        "security": [_ref("components/securitySchemes", "bearer")],
        "messages": [_ref("channels/socket/messages", name)],
        "reply": {
            "channel": _ref("channels", "socket"),
            "messages": [
                _ref("channels/socket/messages", f"{name}.ack"),
                _ref("channels/socket/messages", "error.push"),
            ],
        },
    }


def _client_message(message: MessageDef, role: str | None) -> Json:
    frame = _frame(message.event, _json_schema(message.schema), id=True, required=("event",))
    entry: Json = {"name": message.event, "title": message.event, "summary": message.summary, "payload": frame}
    return entry | ({"x-least-role": role} if role else {})


def _ack_message(message: MessageDef) -> Json:
    frame = _frame("ack", _json_schema(message.ack), id=True, required=("event", "data", "id"))
    return {"name": "ack", "title": f"ack of {message.event}", "summary": "The message succeeded", "payload": frame}


def _push_message(push: Push) -> Json:
    schema = _json_schema(push.schema)
    if push.type:
        schema["properties"]["type"] = {"const": push.type}
    frame = _frame(push.event, schema, id=push.event == "error", required=("event", "data"))
    return {"name": push.event, "title": push.name, "summary": push.summary, "payload": frame}


def _frame(event: str, data: Json, *, id: bool, required: tuple[str, ...]) -> Json:
    properties = {"event": {"const": event}, "data": data} | ({"id": _ID} if id else {})
    return {"type": "object", "properties": properties, "required": list(required), "additionalProperties": False}


def _json_schema(schema: Schema) -> Json:
    spec = APISpec("", "", "3.1.0")
    converter: Any = OpenAPIConverter("3.1.0", schema_name_resolver=lambda _: None, spec=spec)
    json_schema: Json = converter.schema2jsonschema(schema)
    json_schema["additionalProperties"] = False
    return json_schema


def push_name(push: Push) -> str:
    """Return the component name of a push; ``.push`` keeps it apart from a client's message of the same event."""
    return push.type or f"{_name(push.event)}.push"


def _name(event: str) -> str:
    return event.replace(":", ".")


def _ref(section: str, name: str) -> Json:
    return {"$ref": f"#/{section}/{name}"}


_QUERY = {
    "type": "object",
    "properties": {"ticket": {"type": "string", "description": "issued by POST /auth/ws-ticket"}},
}
_DESCRIPTION = """One WebSocket for live collaboration, JSON text frames `{event, data, id?}`.

Send the access token in the `Authorization: Bearer` header, in `Sec-WebSocket-Protocol: collab.v1, bearer.<token>`,
as a ticket of `POST /api/v1/auth/ws-ticket`, or in a first frame `authenticate` within 10 s. The server replies to a
frame with an `id` by exactly one `ack` or `error` with that `id`. After a reconnect, join with `since`, the last
`eventId` that you received, to get the events that you missed. All members of a workspace receive its events in the
same order."""


def page(asyncapi: Json) -> str:
    """Render the document as one HTML page, without scripts or resources of other hosts."""
    messages = asyncapi["components"]["messages"]
    operations = [name for name, operation in asyncapi["operations"].items() if operation["action"] == "receive"]
    pushes = [_last_segment(reference["$ref"]) for reference in asyncapi["operations"]["push"]["messages"]]
    client_articles = "".join(_article(name, messages[name], messages[f"{name}.ack"]) for name in operations)
    push_articles = "".join(_article(name, messages[name]) for name in pushes)
    codes = "".join(f"<tr><td>{code}</td><td>{html.escape(reason)}</td></tr>" for code, reason in CLOSE_CODES.items())
    about = "".join(f"<p>{_render_text(part)}</p>" for part in asyncapi["info"]["description"].split("\n\n"))
    links = _links("Client messages", operations, messages) + _links("Server messages", pushes, messages)
    return _PAGE_TEMPLATE.format(
        title=html.escape(asyncapi["info"]["title"]),
        about=about,
        links=links,
        client_articles=client_articles,
        push_articles=push_articles,
        codes=codes,
        document=DOCUMENT_PATH,
    )


def _links(title: str, names: Iterable[str], messages: Json) -> str:
    items = "".join(
        f'<li><a href="#{html.escape(name)}">{html.escape(messages[name]["title"])}</a></li>' for name in names
    )
    return f"<h2>{title}</h2><ul>{items}</ul>"


def _article(name: str, message: Json, ack: Json | None = None) -> str:
    title, role = html.escape(message["title"]), message.get("x-least-role")
    badge = f' <small class="role">{html.escape(role.lower())}</small>' if role else ""
    parts = [f'<article id="{html.escape(name)}"><h3><code>{title}</code>{badge}</h3>']
    parts.append(f"<p>{_render_text(message['summary'])}</p>{_fields(message)}")
    if ack is not None:
        parts.append(f"<h4>ack</h4>{_fields(ack)}")
    return "".join([*parts, "</article>"])


def _fields(message: Json) -> str:
    data = message["payload"]["properties"]["data"]
    if not data["properties"]:
        return "<p><code>{}</code></p>"
    required = set(data.get("required", ()))
    rows = "".join(
        f"<tr><td><code>{html.escape(name)}</code>{'' if name in required else ' <small>optional</small>'}</td>"
        f"<td>{html.escape(_type_of(shape))}</td><td>{_render_text(shape.get('description', ''))}</td></tr>"
        for name, shape in data["properties"].items()
    )
    return f"<table><tbody>{rows}</tbody></table>"


def _type_of(shape: Json) -> str:
    if "const" in shape:
        return json.dumps(shape["const"]).decode()
    if "enum" in shape:
        # The codes of ``error`` are too many for a cell of the table.
        return "one of " + ", ".join(map(str, shape["enum"])) if len(shape["enum"]) < 9 else "a code"
    if shape.get("type") == "array":
        return f"list of {_type_of(shape['items'])}"
    if shape.get("properties"):
        return "{" + ", ".join(shape["properties"]) + "}"
    kinds = shape.get("type", "anything")
    kind = " or ".join(kinds) if isinstance(kinds, list) else kinds
    return f"{kind}, {shape['format']}" if "format" in shape else str(kind)


def _render_text(text: str) -> str:
    """Escape the text for HTML, with text in backticks as code."""
    parts = html.escape(text).split("`")
    return "".join(f"<code>{part}</code>" if index % 2 else part for index, part in enumerate(parts))


def _last_segment(reference: str) -> str:
    return reference.rpartition("/")[2]


PAGE_POLICY = "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'"
_PAGE_TEMPLATE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
:root {{ color-scheme: light dark; --line: #8884; --soft: #8882; --link: #2563eb; }}
@media (prefers-color-scheme: dark) {{ :root {{ --link: #7aa2ff; }} }}
body {{ font: 16px/1.5 system-ui, sans-serif; margin: 0; display: grid; grid-template-columns: 17rem 1fr; }}
nav {{ position: sticky; top: 0; height: 100vh; overflow: auto; padding: 1rem; box-sizing: border-box;
       border-right: 1px solid var(--line); }}
nav h2 {{ font-size: .8rem; text-transform: uppercase; letter-spacing: .05em; margin: 1rem 0 .3rem; }}
nav ul {{ list-style: none; margin: 0; padding: 0; }}
main {{ padding: 1rem 2rem 4rem; max-width: 56rem; min-width: 0; }}
a {{ color: var(--link); text-decoration: none; }}
article {{ border-top: 1px solid var(--line); padding: .5rem 0 1rem; }}
h3 {{ margin: .5rem 0; }} h4 {{ margin: .8rem 0 .2rem; font-weight: 600; }}
code {{ font: .9em ui-monospace, monospace; background: var(--soft); padding: .1em .3em; border-radius: 4px; }}
table {{ border-collapse: collapse; width: 100%; }}
td:first-child {{ width: 30%; }} td:nth-child(2) {{ width: 30%; }}
td {{ border-bottom: 1px solid var(--line); padding: .3rem .6rem .3rem 0; vertical-align: top; }}
small {{ opacity: .7; }} .role {{ border: 1px solid var(--line); border-radius: 1em; padding: .1em .6em; }}
@media (max-width: 50rem) {{ body {{ display: block; }} nav {{ position: static; height: auto; }} }}
</style></head><body>
<nav><strong>/ws</strong>{links}<h2>More</h2><ul><li><a href="#close-codes">Close codes</a></li>
<li><a href="{document}">AsyncAPI document</a></li><li><a href="/api-docs">REST</a></li></ul></nav>
<main><h1>{title}</h1>{about}
<h2>Client messages</h2>{client_articles}
<h2>Server messages</h2>{push_articles}
<h2 id="close-codes">Close codes</h2><table><tbody>{codes}</tbody></table>
</main></body></html>
"""
