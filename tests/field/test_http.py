"""Faults of HTTP that users saw: conditional requests, CORS, limits of a request's head, numbers, query parameters."""

import asyncio
import io
import json

import aiohttp
import limits
import pytest

from server.app import swagger_document
from server.rest.pagination import encode_cursor
from tests.actors import Actor, Response
from tests.conftest import MakeActor, MakeServer
from tests.documents.editors import make_document
from tests.jobs.requests import program_job
from tests.timeouts import WAIT_TIMEOUT_SECONDS

LATER = "2100-01-01T00:00:00Z"


async def tag_of(actor: Actor, path: str) -> str:
    tag: str = (await actor.get(path)).headers["ETag"]
    return tag


async def put(actor: Actor, document: str, text: str, **conditions: str) -> Response:
    headers = {"Content-Type": "text/plain"} | {name.replace("_", "-"): value for name, value in conditions.items()}
    return await actor.put(f"/documents/{document}/content", data=io.BytesIO(text.encode()), headers=headers)


async def tagged_resources(actor: Actor) -> dict[str, dict[str, str]]:
    """Create one resource of each kind that has an ETag; return a change for each path."""
    workspace = await actor.make_workspace()
    project = (await actor.get(f"/workspaces/{workspace}"))["projectId"]
    return {
        f"/projects/{project}": {"description": "changed"},
        f"/workspaces/{workspace}": {"description": "changed"},
        f"/documents/{await make_document(actor, workspace)}": {"path": "changed.py"},
        "/auth/profile": {"name": "Changed"},
    }


async def test_if_none_match_was_ignored_in_changes(alice: Actor) -> None:
    for path, change in (await tagged_resources(alice)).items():
        tag = await tag_of(alice, path)
        for unmet in ("*", tag, f"W/{tag}", f'"other", {tag}'):
            refused = await alice.patch(path, change, headers={"If-None-Match": unmet})
            assert (refused.status, refused.code) == (412, "precondition_failed"), (path, unmet)
        assert await tag_of(alice, path) == tag
        changed = await alice.patch(path, change, headers={"If-None-Match": '"0", W/"7-owner"'})
        assert changed.status == 200, (path, changed)
        assert (
            await alice.patch(path, change, headers={"If-None-Match": tag})
        ).status == 200  # the tag is outdated now


async def test_if_none_match_was_ignored_in_deletions(alice: Actor) -> None:
    kinds = [path for path in await tagged_resources(alice) if path != "/auth/profile"]
    for path in reversed(kinds):  # the innermost first
        tag = await tag_of(alice, path)
        for unmet in ("*", tag):
            assert (await alice.delete(path, headers={"If-None-Match": unmet})).code == "precondition_failed", path
        assert (await alice.delete(path, headers={"If-None-Match": '"0"'})).status == 204, path
    account = {"password": alice.password}
    refused = await alice.delete(
        "/auth/profile", account, headers={"If-None-Match": await tag_of(alice, "/auth/profile")}
    )
    assert refused.code == "precondition_failed"
    assert (await alice.delete("/auth/profile", account, headers={"If-None-Match": '"0"'})).status == 204


async def test_if_match_is_checked_before_if_none_match_and_both_must_hold(alice: Actor) -> None:
    path = f"/projects/{await alice.make_project()}"
    tag = await tag_of(alice, path)
    for match, none_match, status in ((tag, tag, 412), ('"0"', '"0"', 412), ("*", tag, 412), (tag, '"0"', 200)):
        headers = {"If-Match": match, "If-None-Match": none_match}
        assert (await alice.patch(path, {"name": "x"}, headers=headers)).status == status, headers


async def test_several_lines_of_a_condition_are_one_list(alice: Actor) -> None:
    path = f"/projects/{await alice.make_project()}"
    tag = await tag_of(alice, path)
    lines = [("If-Match", '"0"'), ("If-Match", tag)]
    async with alice.http.patch(
        f"{alice.base}/api/v1{path}", json={"name": "x"}, headers=[*alice.headers.items(), *lines]
    ) as answer:
        assert answer.status == 200


async def test_a_tag_that_only_resembles_the_current_tag_passed_if_match(alice: Actor) -> None:
    path = f"/projects/{await alice.make_project()}"
    tag = await tag_of(alice, path)
    number, role = tag.strip('"').split("-")
    for other in (
        f"0{number}-{role}",
        f"٠{number}-{role}",
        f"{number}-OWNER",
        f"{number}-",
        number,
        f"+{number}-{role}",
    ):
        refused = await alice.patch(path, {"name": "x"}, headers={"If-Match": f'"{other}"'})
        assert (refused.status, refused.code) == (412, "precondition_failed"), other
    assert (await alice.patch(path, {"name": "x"}, headers={"If-Match": tag})).status == 200


async def test_a_weak_tag_never_passes_if_match(alice: Actor) -> None:
    for path, change in (await tagged_resources(alice)).items():
        tag = await tag_of(alice, path)
        for weak in (f"W/{tag}", f'W/{tag}, "0"'):
            refused = await alice.patch(path, change, headers={"If-Match": weak})
            assert (refused.status, refused.code) == (412, "precondition_failed"), path
    workspace = await alice.make_workspace()
    document = await make_document(alice, workspace, content="first")
    content = await tag_of(alice, f"/documents/{document}/content")
    assert (await put(alice, document, "x", If_Match=f"W/{content}")).code == "precondition_failed"


async def test_a_restore_overwrote_a_version_that_its_if_match_did_not_name(alice: Actor) -> None:
    document = await make_document(alice, await alice.make_workspace(), content="first")
    old_tags = [await tag_of(alice, f"/documents/{document}{part}") for part in ("/content", "")]
    assert (await put(alice, document, "second", If_Match="*")).status == 200

    async def restore(**conditions: str) -> Response:
        headers = {name.replace("_", "-"): value for name, value in conditions.items()}
        return await alice.post(f"/documents/{document}/restore", {"version": 1}, headers=headers)

    for tag in (*old_tags, '"0"', "garbage"):
        refused = await restore(If_Match=tag)
        assert (refused.status, refused.code) == (412, "precondition_failed"), tag
    assert (await restore(If_None_Match="*")).code == "precondition_failed"
    for part in ("/content", ""):  # the tag of the text, or that of the document
        current = await tag_of(alice, f"/documents/{document}{part}")
        assert (await restore(If_None_Match=current)).code == "precondition_failed"
        assert (await restore(If_Match=f"W/{current}")).code == "precondition_failed"
        assert (await restore(If_Match=current)).status == 200
    assert (await alice.get(f"/documents/{document}/content")).body == "first"


async def test_ten_restores_on_one_tag_have_one_winner(alice: Actor) -> None:
    document = await make_document(alice, await alice.make_workspace(), content="first")
    tag = await tag_of(alice, f"/documents/{document}")
    answers = await asyncio.gather(
        *(alice.post(f"/documents/{document}/restore", {"version": 1}, headers={"If-Match": tag}) for _ in range(10))
    )
    assert sorted(answer.status for answer in answers) == [200] + [412] * 9


async def test_a_version_changes_its_tag_when_its_author_is_deleted(alice: Actor, bob: Actor) -> None:
    document = await make_document(alice, await alice.make_workspace(None, bob), content="first")
    assert (await put(bob, document, "second", If_Match="*")).status == 200
    path = f"/documents/{document}/versions/2"
    before = await alice.get(path)
    assert before["createdBy"] == bob.id
    assert (await bob.delete("/auth/profile", {"password": bob.password})).status == 204
    after = await alice.get(path, headers={"If-None-Match": before.headers["ETag"]})
    assert (after.status, after["createdBy"]) == (200, None)


async def test_a_put_that_may_only_create_overwrote_a_text(alice: Actor) -> None:
    document = await make_document(alice, await alice.make_workspace(), content="mine")
    for conditions in ({"If_None_Match": "*"}, {"If_None_Match": "*", "If_Match": "*"}):
        refused = await put(alice, document, "theirs", **conditions)
        assert (refused.status, refused.code) == (412, "precondition_failed"), conditions
    tag = await tag_of(alice, f"/documents/{document}/content")
    assert (await put(alice, document, "theirs", If_Match=tag, If_None_Match=tag)).code == "precondition_failed"
    assert (await put(alice, document, "theirs", If_None_Match='"0"')).code == "precondition_required"
    assert (await alice.get(f"/documents/{document}/content")).body == "mine"
    assert (await put(alice, document, "ours", If_Match=tag, If_None_Match='"0"')).status == 200


async def test_a_collaborator_without_an_etag_was_changed_against_if_none_match(alice: Actor, bob: Actor) -> None:
    project = await alice.make_project()
    path = f"/projects/{project}/collaborators/{await alice.add(bob, project)}"
    refused = await alice.patch(path, {"role": "VIEWER"}, headers={"If-None-Match": "*"})
    assert (refused.status, refused.code) == (412, "precondition_failed")
    assert (await alice.patch(path, {"role": "VIEWER"}, headers={"If-None-Match": '"1"'})).status == 200


HEAD_END = b"\r\nHost: x\r\nConnection: close\r\n\r\n"


async def answer_to(server: str, *parts: bytes) -> tuple[int, bytes]:
    """Send all parts, even if the server responds earlier; return the status and the body of its response."""
    reader, writer = await asyncio.open_connection("127.0.0.1", int(server.rpartition(":")[2]))
    for part in parts:
        writer.write(part)
        await asyncio.sleep(0.01)
    async with asyncio.timeout(WAIT_TIMEOUT_SECONDS):
        head, _, body = (await reader.read()).partition(b"\r\n\r\n")
    writer.close()
    return int(head.split()[1]), body


@pytest.mark.parametrize(
    ("parts", "status", "code"),
    [
        ([b"GET /api/v1/projects?q=" + b"a" * 8200], 414, b"uri_too_long"),
        ([b"GET /" + b"a" * 65536, *[b"a" * 65536] * 64, b" HTTP/1.1", HEAD_END], 414, b"uri_too_long"),
        ([b"GET / HTTP/1.1\r\nCookie: " + b"a" * 8200], 431, b"header_fields_too_large"),
        ([b"GET / HTTP/1.1\r\nCookie: ", *[b"a" * 65536] * 64, HEAD_END], 431, b"header_fields_too_large"),
        ([b"GET / HTTP/1.1\r\n", *[b"X-Some: thing\r\n" * 64] * 64, HEAD_END], 431, b"header_fields_too_large"),
    ],
    ids=["long URI", "endless URI", "long header", "endless header", "endless headers"],
)
async def test_an_oversized_head_was_reported_as_a_malformed_request(
    server: str, parts: list[bytes], status: int, code: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.rest.runner.LINGER_TIMEOUT_SECONDS", WAIT_TIMEOUT_SECONDS)
    got, body = await answer_to(server, *parts)
    assert got == status
    assert b'"code":"' + code in body


async def test_a_head_within_the_limits_is_accepted(server: str) -> None:
    request_line = b"GET /health?" + b"a" * 8000 + b" HTTP/1.1"
    headers = b"".join(b"\r\nX-%d: 1" % number for number in range(120))
    cookie = b"\r\nCookie: " + b"a" * 8000
    assert (await answer_to(server, request_line + headers + cookie + HEAD_END))[0] == 200


OUR_ORIGIN, FOREIGN_ORIGIN = "https://app.example.org", "https://evil.example.org"


async def test_a_browser_could_not_read_error_responses_of_the_api(
    make_server: MakeServer, make_actor: MakeActor
) -> None:
    limited = await make_server(
        cors_origin=(OUR_ORIGIN, "https://other.example.org"), rate_limit_default=limits.parse("8/15minutes")
    )
    page = await make_actor("Page", limited)
    for method, path, status in (
        ("GET", "/nowhere", 404),
        ("GET", "/projects/nonsense", 404),
        ("GET", "/api/nowhere", 404),
        ("OPTIONS", "/nowhere", 404),
        ("PUT", "/projects", 405),
        ("PATCH", "/projects", 405),
        ("POST", "/projects", 422),
        ("GET", "/projects?limit=x", 422),
        ("GET", "/projects", 200),
        ("GET", "/projects", 429),
    ):
        answer = await page.call(method, path, headers={"Origin": OUR_ORIGIN})
        assert answer.status == status, (method, path)
        assert answer.headers["Access-Control-Allow-Origin"] == OUR_ORIGIN, (method, path)
        assert "X-Request-Id" in answer.headers["Access-Control-Expose-Headers"]
        foreign = await page.call(method, path, headers={"Origin": FOREIGN_ORIGIN})
        assert "Access-Control-Allow-Origin" not in foreign.headers, (method, path)


async def test_a_browser_could_not_read_that_its_uri_was_too_long(make_server: MakeServer) -> None:
    async def headers(server: str) -> bytes:
        reader, writer = await asyncio.open_connection("127.0.0.1", int(server.rpartition(":")[2]))
        writer.write(
            b"GET /api/v1/projects?q=" + b"a" * 9000 + b" HTTP/1.1\r\nOrigin: " + OUR_ORIGIN.encode() + HEAD_END
        )
        head = await reader.readuntil(b"\r\n\r\n")
        writer.close()
        return head

    assert f"Access-Control-Allow-Origin: {OUR_ORIGIN}".encode() in await headers(
        await make_server(cors_origin=(OUR_ORIGIN,))
    )
    assert b"Access-Control-Allow-Origin: *" in await headers(await make_server(cors_origin=("*",)))


async def test_options_without_an_origin_was_forbidden(alice: Actor, http: aiohttp.ClientSession) -> None:
    anonymous = Actor(http, alice.base, "Anonymous")
    for path, methods in (
        ("/projects", "GET, HEAD, OPTIONS, POST"),
        ("/auth/sessions", "DELETE, GET, HEAD, OPTIONS"),
        ("/documents/anything/content", "GET, HEAD, OPTIONS, PUT"),
        ("/jobs/stats", "GET, HEAD, OPTIONS"),
    ):
        answer = await anonymous.call("OPTIONS", path)
        assert (answer.status, answer.headers["Allow"], answer.body) == (204, methods, "")
    unknown = await anonymous.call("OPTIONS", "/nowhere")
    assert (unknown.status, unknown.code) == (404, "not_found")


async def test_an_options_request_that_is_no_preflight_was_forbidden(make_server: MakeServer, http) -> None:
    page = Actor(http, await make_server(cors_origin=(OUR_ORIGIN,)), "Page")
    answer = await page.call("OPTIONS", "/projects", headers={"Origin": OUR_ORIGIN})
    assert (answer.status, answer.headers["Access-Control-Allow-Origin"]) == (204, OUR_ORIGIN)
    assert "POST" in answer.headers["Allow"]


INVALID_NUMBERS = ("1_0", "+1", " 1", "1 ", "-1", "\u0663", "1e1", "1.0", "0x1", "", "1" * 20)


async def test_numbers_in_queries_were_read_as_python_reads_them(alice: Actor) -> None:
    project = await alice.make_project()
    workspace = await alice.make_workspace(project)
    job = (await alice.post("/jobs", {**program_job(), "runAt": LATER}))["job"]["id"]
    for path, name in (
        ("/projects", "limit"),
        (f"/projects/{project}/activity", "limit"),
        (f"/workspaces/{workspace}/documents", "limit"),
        (f"/workspaces/{workspace}/events", "limit"),
        (f"/jobs/{job}/logs", "limit"),
        (f"/jobs/{job}/logs", "after"),
        (f"/jobs/{job}/logs", "cursor"),
    ):
        for text in INVALID_NUMBERS:
            refused = await alice.get(path, params={name: text})
            assert (refused.status, refused.code) == (422, "validation_failed"), (path, name, text)
            assert refused["details"][0]["field"] == name
        assert (await alice.get(path, params={name: "007"})).status == 200
    for event in ("1_0-0", "\u0661-0", "+1-0", "1-0 "):
        refused = await alice.get(f"/workspaces/{workspace}/events", params={"after": event})
        assert (refused.status, refused["details"][0]["field"]) == (422, "after"), event


@pytest.mark.parametrize("key", ["1_0", "+1", " 1", "\u0661", "9223372036854775808"])
async def test_a_cursor_with_such_a_number_was_accepted(alice: Actor, key: str) -> None:
    cursor = encode_cursor(key, list_name="activity")
    refused = await alice.get(f"/projects/{await alice.make_project()}/activity", params={"cursor": cursor})
    assert (refused.status, refused["details"][0]["field"]) == (422, "cursor")


async def test_misspelt_query_parameters_were_ignored(alice: Actor) -> None:
    workspace = await alice.make_workspace()
    project = (await alice.get(f"/workspaces/{workspace}"))["projectId"]
    for method, path in (
        ("GET", "/projects?Limit=5"),
        ("GET", "/projects?limit=5&page=2"),
        ("GET", f"/projects/{project}?expand=members"),
        ("GET", f"/workspaces/{workspace}/documents?sort=path"),
        ("GET", "/auth/profile?x"),
        ("HEAD", "/auth/profile?x"),
        ("GET", "/jobs/stats?workspaceId=1"),
        ("POST", "/projects?dryRun=true"),
        ("PATCH", f"/projects/{project}?x=1"),
        ("DELETE", f"/projects/{project}?force=1"),
        ("GET", "/projects?%00=1"),
        ("GET", "/projects?%ED%A0%80=1"),
    ):
        body = {"name": "x"} if method == "POST" else None
        refused = await alice.call(method, path, body)
        assert refused.status == 422, (method, path)
        if method != "HEAD":
            assert refused.code == "validation_failed"
            assert len(refused["details"]) == 1
    assert (await alice.get("/projects?limit=5&page=2"))["details"][0]["field"] == "page"
    assert [item["id"] for item in (await alice.get("/projects"))["items"]] == [project]
    assert (await alice.get("/projects?limit=x&limit=5")).status == 200  # the last one counts


async def test_unknown_query_parameters_are_ignored_on_routes_without_json_responses(alice: Actor) -> None:
    document = await make_document(alice, await alice.make_workspace(), content="text")
    assert (await alice.get(f"/documents/{document}/content?download=1")).body == "text"
    assert (await alice.get("/health?t=1")).status == 200
    assert (await alice.call("OPTIONS", "/projects?x=1")).status == 204
    assert (await alice.get("/nowhere?x=1")).status == 404


async def test_jobs_of_a_workspace_could_not_be_listed(alice: Actor, bob: Actor, carol: Actor) -> None:
    project = await alice.make_project(bob)
    here, there = await alice.make_workspace(project), await alice.make_workspace(project)
    place = {"workspaceId": here, "runAt": LATER}
    jobs = [(await actor.post("/jobs", {**program_job(), **place}))["job"]["id"] for actor in (alice, bob, alice)]
    other = (await alice.post("/jobs", {**program_job(), "workspaceId": there, "runAt": LATER}))["job"]["id"]
    await alice.post("/jobs", {**program_job(), "runAt": LATER})

    async def listed(query: str) -> list[str]:
        return [job["id"] for job in (await bob.get(f"/jobs?{query}"))["items"]]

    assert await listed(f"workspaceId={here}") == jobs[::-1]
    assert await listed(f"workspaceId={here}&projectId={project}&limit=2") == jobs[:0:-1]
    assert await listed(f"workspaceId={there}") == [other]
    assert await listed(f"projectId={project}") == [other, *jobs[::-1]]
    assert (await carol.get(f"/jobs?workspaceId={here}")).code == "not_found"
    contradiction = await alice.get(f"/jobs?workspaceId={here}&projectId={await alice.make_project()}")
    assert (contradiction.status, contradiction.code) == (422, "validation_failed")
    assert (await alice.get("/jobs?workspaceId=nonsense")).status == 422


async def test_a_job_with_a_run_time_in_the_past_runs_at_once_and_the_openapi_document_says_so(alice: Actor) -> None:
    run_at = swagger_document()["definitions"]["NewJob"]["properties"]["runAt"]
    assert "in the past" in run_at["description"]
    before = (await alice.get("/jobs/stats"))["queue"]
    created = await alice.post("/jobs", {**program_job(), "runAt": "2001-01-01T00:00:00Z"})
    assert (created.status, created["job"]["runAt"]) == (201, "2001-01-01T00:00:00.000Z")
    after = (await alice.get("/jobs/stats"))["queue"]
    assert (after["queued"], after["scheduled"]) == (before["queued"] + 1, before["scheduled"])


ABOVE_INT64 = 9223372036854775808  # 2**63


async def test_large_integers_became_other_numbers(alice: Actor, bob: Actor) -> None:
    workspace = await alice.make_workspace(None, bob)
    project = (await alice.get(f"/workspaces/{workspace}"))["projectId"]
    analysis = {"type": "DATA_ANALYSIS", "payload": {"format": "csv", "content": "a", "n": ABOVE_INT64}}
    for method, path, body, field in (
        ("POST", "/projects", {"name": "x", "settings": {"n": ABOVE_INT64}}, "settings.n"),
        ("PATCH", f"/projects/{project}", {"settings": {"deep": [{"n": -ABOVE_INT64 - 1}]}}, "settings.deep.0.n"),
        ("POST", "/workspaces", {"projectId": project, "name": "x", "meta": {"n": 10**30}}, "meta.n"),
        ("PATCH", f"/workspaces/{workspace}", {"meta": {"n": 10**400}}, "meta.n"),
        ("POST", "/jobs", analysis, "payload.n"),
        ("POST", "/auth/logout", {"refreshToken": ABOVE_INT64}, "refreshToken"),
    ):
        refused = await alice.call(method, path, data=json.dumps(body), headers={"Content-Type": "application/json"})
        assert (refused.status, refused.code) == (422, "validation_failed"), (path, refused)
        assert refused["details"][0]["field"] == field
        assert "64-bit" in refused["details"][0]["message"]
    exact = {"n": [ABOVE_INT64 - 1, -ABOVE_INT64, 0.1000000000000000055511151231257827, 1e22, str(ABOVE_INT64)]}
    raw = json.dumps({"name": "x", "settings": exact})
    created = await alice.post("/projects", data=raw, headers={"Content-Type": "application/json"})
    assert (created.status, created["settings"]) == (201, exact)


async def test_large_integers_in_frames_became_other_numbers(alice: Actor, bob: Actor) -> None:
    workspace = await alice.make_workspace(None, bob)
    hers, his = await alice.connect(workspace), await bob.connect(workspace)
    frame = {"event": "file:change", "data": {"workspaceId": workspace, "change": {"at": ABOVE_INT64}}, "id": 1}
    await hers.raw.send_str(json.dumps(frame))
    await hers.assert_push("USER_JOIN")
    refused = await hers.next()
    assert (refused["event"], refused["id"], refused["data"]["code"]) == ("error", 1, "validation_failed")
    assert refused["data"]["details"][0]["field"] == "change.at"
    await hers.raw.send_str(json.dumps({"event": "ping", "id": ABOVE_INT64}))
    refused = await hers.next()
    assert (refused["event"], refused.get("id"), refused["data"]["code"]) == ("error", None, "validation_failed")
    await hers.push("file:change", workspaceId=workspace, change={"at": ABOVE_INT64 - 1})
    assert (await his.assert_push("FILE_CHANGE"))["change"] == {"at": ABOVE_INT64 - 1}


def test_generated_clients_sent_the_word_null_as_a_key() -> None:
    for name, definition in swagger_document()["definitions"].items():
        for field, described in definition["properties"].items():
            assert described.get("default", "") is not None, (name, field)
