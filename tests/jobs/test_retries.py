"""Retries: failed attempts are repeated with growing backoff; a failed or cancelled job can be retried."""

from datetime import UTC, datetime, timedelta

import aiohttp
import pytest

from server.jobs.lifecycle import retry_backoff
from tests.actors import Actor
from tests.conftest import environment_of
from tests.jobs.requests import program_job, submit_job
from tests.processes import Processes


def seconds_between(first: str, second: str) -> float:
    return (datetime.fromisoformat(second) - datetime.fromisoformat(first)).total_seconds()


@pytest.mark.parametrize(("attempts", "seconds"), [(1, 1), (2, 2), (3, 4), (6, 32), (7, 60), (1000, 60)])
def test_backoff_doubles_up_to_a_minute_with_jitter(attempts: int, seconds: float) -> None:
    assert retry_backoff(attempts, random_value=0.5) == timedelta(seconds=seconds)
    assert retry_backoff(attempts, random_value=0) == timedelta(seconds=seconds * 0.8)
    assert retry_backoff(attempts, random_value=1) == timedelta(seconds=seconds * 1.2)


async def test_job_fails_after_three_attempts_with_growing_backoff_and_can_be_retried(
    processes: Processes, isolated_stores: dict[str, str], http: aiohttp.ClientSession
) -> None:
    variables = environment_of(isolated_stores)
    server, faulty = processes.server(**variables), processes.worker(**variables, JOB_FAULT_RATE="1").ready()
    ada = await Actor(http, server.base, "Ada").register()
    failed = await ada.finished_job((await submit_job(ada))["id"])
    assert (failed["status"], failed["attempts"], failed["error"]["code"]) == ("failed", 3, "fault")
    assert [(attempt["attempt"], attempt["error"]["code"]) for attempt in failed["history"]] == [
        (n, "fault") for n in (1, 2, 3)
    ]
    first, second, third = failed["history"]
    assert seconds_between(first["finishedAt"], second["startedAt"]) >= 0.8
    assert seconds_between(second["finishedAt"], third["startedAt"]) >= 1.6

    faulty.kill()
    processes.worker(**variables).ready()
    again = await ada.post(f"/jobs/{failed['id']}/retry")
    assert (again.status, again["status"], again["attempts"], again["error"]) == (202, "pending", 0, None)
    done = await ada.finished_job(failed["id"])
    assert (done["status"], done["attempts"], done["result"]["stdout"]) == ("completed", 1, "42\n")
    assert len(done["history"]) == 4


@pytest.mark.usefixtures("worker")
async def test_only_a_failed_or_cancelled_job_can_be_retried(alice: Actor) -> None:
    job = (await submit_job(alice))["id"]
    await alice.finished_job(job)
    refused = await alice.post(f"/jobs/{job}/retry")
    assert (refused.status, refused.code) == (409, "not_retryable")


@pytest.mark.usefixtures("worker")
async def test_a_scheduled_job_runs_at_its_time(alice: Actor) -> None:
    at = datetime.now(UTC) + timedelta(seconds=1.5)
    job = await submit_job(alice, runAt=at.isoformat())
    assert job["status"] == "pending"
    assert job["runAt"] == at.isoformat(timespec="milliseconds").replace("+00:00", "Z")
    done = await alice.finished_job(job["id"])
    assert seconds_between(job["runAt"], done["startedAt"]) >= 0


@pytest.mark.usefixtures("worker")
async def test_past_run_time_means_now(alice: Actor) -> None:
    job = await submit_job(alice, runAt="2020-01-01T00:00:00Z")
    assert (await alice.finished_job(job["id"]))["status"] == "completed"


@pytest.mark.parametrize("sign", ["+", "-"])
async def test_run_time_at_the_limits_of_datetime_is_rejected_or_stored(alice: Actor, sign: str) -> None:
    first, last = f"0001-01-01T00:00:00{sign}12:00", f"9999-12-31T23:59:59{sign}12:00"
    refused, kept = (first, last) if sign == "+" else (last, first)
    answer = await alice.post("/jobs", program_job() | {"runAt": refused})
    assert (answer.status, answer.code, answer["details"][0]["field"]) == (422, "validation_failed", "runAt")
    at = datetime.fromisoformat(kept).astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    assert (await submit_job(alice, runAt=kept))["runAt"] == at


async def test_viewer_can_neither_cancel_nor_retry_a_visible_job(alice: Actor, bob: Actor, carol: Actor) -> None:
    project = await alice.make_project()
    await alice.add(bob, project, role="VIEWER")
    job = (await submit_job(alice, program_job(), projectId=project, runAt="2100-01-01T00:00:00Z"))["id"]
    for action in ("cancel", "retry"):
        assert (await bob.post(f"/jobs/{job}/{action}")).code == "forbidden"
        assert (await carol.post(f"/jobs/{job}/{action}")).code == "not_found"
    await alice.add(carol, project)
    assert (await carol.post(f"/jobs/{job}/cancel"))["status"] == "cancelled"
