"""The helper process of DATA_ANALYSIS, which may be killed at any moment.

``analysis_process.py PARENT FILE FORMAT`` prints its progress, 0–100, one line each, and the result as JSON in the
last line. The result of a file that does not have the declared format is ``{"refused": reason}``.

The process has no access to the server's packages and environment, only to its own directory. The data are untrusted;
no SQL comes from a client.
"""

import ctypes
import json
import math
import os
import resource
import signal
import sys
from collections.abc import Iterator
from decimal import Decimal
from itertools import combinations
from pathlib import Path
from typing import Any

MEMORY = "48MB"  # of DuckDB, which spills the rest to disk. The process stays within 128 MB for 10 MB of CSV.
DISK = "512MB"
ADDRESS_SPACE = 2 << 30
FILE_BYTES = 1 << 30
CPU_SECONDS = 110
MOST_COLUMNS = 200
MOST_CORRELATED = 20  # columns
TOP = 5
SHOWN_CHARACTERS = 200
STRONG = 0.7
READ_PERCENT, DESCRIBED_PERCENT = 30, 90  # approximate shares of the duration
_PR_SET_PDEATHSIG = 1

READ = {
    "csv": "read_csv(?, header = true, sample_size = -1, buffer_size = 1048576, max_line_size = 524288)",
    "json": "read_json(?, format = 'auto', sample_size = -1, maximum_object_size = 16777216)",
    "jsonl": "read_json(?, format = 'newline_delimited', sample_size = -1, maximum_object_size = 16777216)",
}
NUMBERS = {"integer", "number"}
TYPES = {
    "integer": ("TINYINT", "SMALLINT", "INTEGER", "BIGINT", "HUGEINT", "UTINYINT", "USMALLINT", "UINTEGER", "UBIGINT"),
    "number": ("FLOAT", "DOUBLE", "DECIMAL"),
    "boolean": ("BOOLEAN",),
    "date": ("DATE",),
    "datetime": ("TIMESTAMP",),
    "time": ("TIME",),
    "string": ("VARCHAR", "UUID"),
}


def main() -> None:
    parent, path, format = int(sys.argv[1]), sys.argv[2], sys.argv[3]
    confine(parent)
    import duckdb  # after the limits

    try:
        result = analyse(duckdb, path, format)
    except duckdb.Error as error:
        # The first line states the error; the others reveal paths and options of the server.
        result = {"refused": str(error).splitlines()[0].replace(path, "the data")[:500]}
    json.dump(result, sys.stdout, allow_nan=False)


def confine(parent: int) -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # the worker has exited in between
        os._exit(1)
    for limit, value in (
        (resource.RLIMIT_AS, ADDRESS_SPACE),
        (resource.RLIMIT_CPU, CPU_SECONDS),
        (resource.RLIMIT_FSIZE, FILE_BYTES),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(limit, (value, value))


def analyse(duckdb: Any, path: str, format: str) -> dict[str, Any]:
    db = duckdb.connect(
        config={
            "threads": 1,
            "memory_limit": MEMORY,
            "temp_directory": str(Path(path).parent / "spill"),
            "max_temp_directory_size": DISK,
            "preserve_insertion_order": False,
            "autoinstall_known_extensions": False,
            "autoload_known_extensions": False,
        }
    )
    db.execute(f"CREATE TABLE data AS SELECT * FROM {READ[format]}", [path])
    db.execute("SET enable_external_access = false")
    reached(READ_PERCENT)
    types = [(name, type_of(declared)) for name, declared, *_ in db.execute("DESCRIBE data").fetchall()]
    if len(types) > MOST_COLUMNS:
        return {"refused": f"Table exceeds the maximum of {MOST_COLUMNS} columns"}
    rows = db.execute("SELECT count(*) FROM data").fetchone()[0]
    columns = list(columns_of(db, types))
    correlated = list(correlations(db, [column["name"] for column in columns if column["type"] in NUMBERS]))
    return {
        "rows": rows,
        "columns": columns,
        "correlations": correlated,
        "insights": list(insights(rows, columns, correlated)),
    }


def reached(percent: float) -> None:
    sys.stdout.write(f"{percent:.1f}\n")
    sys.stdout.flush()


def type_of(declared: str) -> str:
    if not declared.endswith("]"):
        for name, prefixes in TYPES.items():
            if declared.startswith(prefixes):
                return name
    return "json"


def columns_of(db: Any, types: list[tuple[str, str]]) -> Iterator[dict[str, Any]]:
    for number, (name, type) in enumerate(types, 1):
        yield column(db, name, type)
        reached(READ_PERCENT + (DESCRIBED_PERCENT - READ_PERCENT) * number / len(types))


def column(db: Any, name: str, type: str) -> dict[str, Any]:
    expression = value_of(name, type)
    nulls, distinct, minimum, maximum = db.execute(
        f"SELECT count(*) - count({expression}), count(DISTINCT {expression}), min({expression}), max({expression}) "
        f"FROM data"
    ).fetchone()
    mean = std = quartiles = None
    if type in NUMBERS:
        mean, std, quartiles = db.execute(
            f"SELECT avg(x), stddev_samp(x), quantile_cont(x, [0.25, 0.5, 0.75]) "
            f"FROM (SELECT CAST({expression} AS DOUBLE) AS x FROM data)"
        ).fetchone()
    top = db.execute(
        f"SELECT {expression}, count(*) FROM data WHERE {expression} IS NOT NULL "
        f"GROUP BY 1 ORDER BY 2 DESC, 1 LIMIT {TOP}"
    ).fetchall()
    return {
        "name": name,
        "type": type,
        "nulls": nulls,
        "distinct": distinct,
        "min": shown(minimum),
        "max": shown(maximum),
        "mean": shown(mean),
        "std": shown(std),
        "quartiles": [shown(quartile) for quartile in quartiles] if quartiles else None,
        "top": [{"value": shown(value), "count": count} for value, count in top],
    }


def correlations(db: Any, numbers: list[str]) -> Iterator[dict[str, Any]]:
    """Yield Pearson's coefficient of every pair of the first numeric columns, except constant columns."""
    pairs = list(combinations(numbers[:MOST_CORRELATED], 2))
    if not pairs:
        return
    coefficients = ", ".join(f"corr({finite(a)}, {finite(b)})" for a, b in pairs)
    for pair, coefficient in zip(pairs, db.execute(f"SELECT {coefficients} FROM data").fetchone(), strict=True):
        if shown(coefficient) is not None:
            yield {"columns": list(pair), "coefficient": round(coefficient, 6)}


def insights(rows: int, columns: list[dict[str, Any]], correlated: list[dict[str, Any]]) -> Iterator[str]:
    yield f"{rows} rows, {len(columns)} columns"
    for column in columns:
        name, filled = column["name"], rows - column["nulls"]
        if rows and not filled:
            yield f"{name} is empty"
        elif column["nulls"]:
            yield f"{name} is missing in {column['nulls']} of {rows} rows ({100 * column['nulls'] / rows:.1f} %)"
        if filled > 1 and column["distinct"] == 1:
            yield f"{name} is always {column['min']}"
        elif filled > 1 and column["distinct"] == rows:
            yield f"{name} is different in every row"
        elif filled > 1 and column["top"] and column["top"][0]["count"] > filled / 2:
            yield f"{name} is mostly {column['top'][0]['value']} ({100 * column['top'][0]['count'] / filled:.0f} %)"
        yield from spread(column)
    for correlation in correlated:
        if abs(correlation["coefficient"]) >= STRONG:
            a, b = correlation["columns"]
            direction = "rises" if correlation["coefficient"] > 0 else "falls"
            yield f"{b} {direction} with {a} (correlation {correlation['coefficient']:.2f})"


def spread(column: dict[str, Any]) -> Iterator[str]:
    """Describe far outliers: values beyond Tukey's outer fences."""
    if column["quartiles"] is None or None in column["quartiles"] or column["min"] is None:
        return
    low, _, high = column["quartiles"]
    reach = 3 * (high - low)
    if reach and column["max"] > high + reach:
        yield f"{column['name']} has values far above the rest, up to {column['max']}"
    if reach and column["min"] < low - reach:
        yield f"{column['name']} has values far below the rest, down to {column['min']}"


def shown(value: Any) -> Any:
    """Convert a value to one that JSON and the record can hold."""
    if isinstance(value, Decimal):
        value = float(value)
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, bool) or value is None:
        return value
    if isinstance(value, int):
        return value if -(2**63) <= value < 2**63 else float(value)
    text = value.isoformat() if hasattr(value, "isoformat") else str(value)
    return text if len(text) <= SHOWN_CHARACTERS else text[:SHOWN_CHARACTERS] + "…"


def value_of(name: str, type: str) -> str:
    if type == "json":
        return f"CAST({quoted(name)} AS VARCHAR)"
    return finite(name) if type == "number" else quoted(name)


def finite(name: str) -> str:
    """Return an SQL expression in which NaN and infinity count as missing."""
    return f"CASE WHEN isfinite(CAST({quoted(name)} AS DOUBLE)) THEN {quoted(name)} END"


def quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


if __name__ == "__main__":
    main()
