"""DATA_ANALYSIS: the description of a table, within its limits."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from server.jobs import analysis_process, helper_process
from tests.actors import Actor
from tests.jobs.requests import submit_job

pytestmark = pytest.mark.usefixtures("worker")
MEASURE = """
import os, resource, subprocess, sys
done = subprocess.run([sys.executable, "-I", sys.argv[1], str(os.getpid()), *sys.argv[2:]], env={}, capture_output=True)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss, done.returncode, done.stdout.decode(), sep="\\n")
"""


async def analysed(actor: Actor, format: str, content: str) -> dict[str, Any]:
    job = await submit_job(actor, {"type": "DATA_ANALYSIS", "payload": {"format": format, "content": content}})
    done = await actor.finished_job(job["id"])
    assert done["status"] == "completed", done
    result: dict[str, Any] = done["result"]
    return result


async def test_a_table_is_described_column_by_column(alice: Actor) -> None:
    rows = [f"{n},{n * 2.5},{'Rome' if n < 8 else 'Oslo'},2024-01-{n + 1:02},{n % 2 == 0}" for n in range(10)]
    result = await analysed(alice, "csv", "\n".join(["n,price,city,day,even", *rows, ",,,,"]))
    assert result["rows"] == 11
    n, price, city, day, even = result["columns"]
    assert (n["name"], n["type"], n["nulls"], n["distinct"], n["min"], n["max"]) == ("n", "integer", 1, 10, 0, 9)
    assert (n["mean"], round(n["std"], 3), n["quartiles"]) == (4.5, 3.028, [2.25, 4.5, 6.75])
    assert (price["type"], price["max"], price["mean"]) == ("number", 22.5, 11.25)
    assert (city["type"], city["distinct"], city["mean"], city["quartiles"]) == ("string", 2, None, None)
    assert city["top"] == [{"value": "Rome", "count": 8}, {"value": "Oslo", "count": 2}]
    assert (day["type"], day["min"], day["max"]) == ("date", "2024-01-01", "2024-01-10")
    assert (even["type"], even["min"], even["max"]) == ("boolean", False, True)
    assert result["correlations"] == [{"columns": ["n", "price"], "coefficient": 1.0}]
    assert result["insights"] == [
        "11 rows, 5 columns",
        "n is missing in 1 of 11 rows (9.1 %)",
        "price is missing in 1 of 11 rows (9.1 %)",
        "city is missing in 1 of 11 rows (9.1 %)",
        "city is mostly Rome (80 %)",
        "day is missing in 1 of 11 rows (9.1 %)",
        "even is missing in 1 of 11 rows (9.1 %)",
        "price rises with n (correlation 1.00)",
    ]


@pytest.mark.parametrize(
    ("format", "content"),
    [("json", '[{"a": 1, "b": {"c": [1]}}, {"a": 3.5}]'), ("jsonl", '{"a": 1, "b": {"c": [1]}}\n{"a": 3.5}\n')],
)
async def test_json_is_a_table_too(alice: Actor, format: str, content: str) -> None:
    result = await analysed(alice, format, content)
    assert [(column["name"], column["type"], column["nulls"]) for column in result["columns"]] == [
        ("a", "number", 0),
        ("b", "json", 1),
    ]


async def test_non_finite_numbers_count_as_missing(alice: Actor) -> None:
    result = await analysed(alice, "csv", "x,y\n1.5,1\nnan,2\ninf,3\n-inf,4\n2.5,5\n")
    x = result["columns"][0]
    assert (x["nulls"], x["min"], x["max"], x["mean"], x["distinct"]) == (3, 1.5, 2.5, 2.0, 2)
    assert [top["value"] for top in x["top"]] == [1.5, 2.5]
    assert result["correlations"] == [{"columns": ["x", "y"], "coefficient": 1.0}]
    empty = await analysed(alice, "csv", "x\nnan\nnan\n")
    assert empty["insights"] == ["2 rows, 1 columns", "x is empty"]


async def test_analysis_reports_its_progress(tmp_path: Path) -> None:
    (tmp_path / "data").write_text("x,y\n1,2\n3,4\n")
    reported = []

    async def progress(percent: float) -> None:
        reported.append(percent)

    program = Path(analysis_process.__file__)
    result = await helper_process.run(program, str(tmp_path / "data"), "csv", cwd=tmp_path, on_progress=progress)
    assert json.loads(result)["rows"] == 2
    assert reported == [30, 60, 90]  # after reading, and after each column


async def test_the_data_of_a_document_are_analysed(alice: Actor, bob: Actor) -> None:
    workspace = await alice.make_workspace()
    document = await alice.post(f"/workspaces/{workspace}/documents", {"path": "data.csv", "content": "x\n1\n2\n"})
    request = {"type": "DATA_ANALYSIS", "payload": {"format": "csv", "documentId": document["id"]}}
    job = await submit_job(alice, request)
    assert job["workspaceId"] == workspace
    assert (await alice.finished_job(job["id"]))["result"]["columns"][0]["mean"] == 1.5
    assert (await bob.post("/jobs", request)).code == "not_found"


async def test_data_of_another_format_fail_without_a_retry(alice: Actor) -> None:
    request = {"type": "DATA_ANALYSIS", "payload": {"format": "jsonl", "content": '{"a":'}}
    done = await alice.finished_job((await submit_job(alice, request))["id"])
    assert (done["status"], done["attempts"], done["error"]["code"]) == ("failed", 1, "validation_failed")
    assert "JSON" in done["error"]["message"]
    assert "/" not in done["error"]["message"]  # no path of the server


@pytest.mark.parametrize(
    "payload",
    [
        {"format": "csv"},
        {"format": "csv", "content": ""},
        {"format": "xlsx", "content": "x"},
        {"format": "csv", "content": "x", "documentId": "6f0ffee8-9a3c-4cd9-8ffb-3f7e0f2b7a44"},
    ],
)
async def test_invalid_payload_is_rejected(alice: Actor, payload: dict[str, Any]) -> None:
    assert (await alice.post("/jobs", {"type": "DATA_ANALYSIS", "payload": payload})).status == 422


def table(path: Path, size: int, row: Any) -> None:
    with path.open("w") as file:
        file.write("id,name,price,note\n")
        number = 0
        while file.tell() < size:
            file.write(row(number))
            number += 1


@pytest.mark.parametrize(
    "row",
    [
        lambda n: f"{n},name{n % 5000},{random.random() * 100:.3f},{random.choice(['a', 'b'])}\n",
        lambda n: f"{n},{random.randbytes(16).hex()},{random.random()},{random.randbytes(40).hex()}\n",
    ],
    ids=["few values", "all values distinct"],
)
def test_ten_megabytes_are_analysed_within_128_mb(tmp_path: Path, row: Any) -> None:
    table(tmp_path / "data", 10 << 20, row)
    command = [sys.executable, "-c", MEASURE, analysis_process.__file__, str(tmp_path / "data"), "csv"]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\n", 2)
    assert output[1] == "0"
    assert json.loads(output[2].splitlines()[-1])["columns"][0]["distinct"] > 50_000
    assert int(output[0]) < 128 * 1024  # kilobytes


def test_the_analysis_does_not_outlive_its_worker(tmp_path: Path) -> None:
    (tmp_path / "data").write_text("x\n1\n")
    orphan = subprocess.run(
        [sys.executable, "-I", analysis_process.__file__, str(os.getppid()), str(tmp_path / "data"), "csv"], check=False
    )
    assert orphan.returncode == 1
