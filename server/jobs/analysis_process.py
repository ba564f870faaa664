"""The helper process of DATA_ANALYSIS, which may be killed at any moment.

``analysis_process.py PARENT FILE FORMAT`` prints its progress, 0–100, one line each, and the result as JSON in the
last line. The result of a file that does not have the declared format is ``{"rejected": reason}``.

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

MEMORY_LIMIT = "48MB"  # of DuckDB, which spills the rest to disk. The process stays within 128 MB for 10 MB of CSV.
SPILL_LIMIT = "512MB"
MAX_ADDRESS_SPACE_BYTES = 2 << 30
MAX_FILE_BYTES = 1 << 30
MAX_CPU_SECONDS = 110
MAX_COLUMNS = 200
MAX_CORRELATED_COLUMNS = 20
MAX_TOP_VALUES = 5
MAX_VALUE_CHARACTERS = 200
MIN_STRONG_CORRELATION = 0.7
READ_PERCENT, DESCRIBED_PERCENT = 30, 90  # approximate shares of the duration
_PR_SET_PDEATHSIG = 1

READERS = {
    "csv": "read_csv(?, header = true, sample_size = -1, buffer_size = 1048576, max_line_size = 524288)",
    "json": "read_json(?, format = 'auto', sample_size = -1, maximum_object_size = 16777216)",
    "jsonl": "read_json(?, format = 'newline_delimited', sample_size = -1, maximum_object_size = 16777216)",
}
NUMERIC_TYPES = {"integer", "number"}
TYPE_PREFIXES = {
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
        result = analyze_file(duckdb, path, format)
    except duckdb.Error as error:
        # The first line states the error; the others reveal paths and options of the server.
        result = {"rejected": str(error).splitlines()[0].replace(path, "the data")[:500]}
    json.dump(result, sys.stdout, allow_nan=False)


def confine(parent: int) -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # the worker has exited in between
        os._exit(1)
    for limit, value in (
        (resource.RLIMIT_AS, MAX_ADDRESS_SPACE_BYTES),
        (resource.RLIMIT_CPU, MAX_CPU_SECONDS),
        (resource.RLIMIT_FSIZE, MAX_FILE_BYTES),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(limit, (value, value))


def analyze_file(duckdb: Any, path: str, format: str) -> dict[str, Any]:
    db = duckdb.connect(
        config={
            "threads": 1,
            "memory_limit": MEMORY_LIMIT,
            "temp_directory": str(Path(path).parent / "spill"),
            "max_temp_directory_size": SPILL_LIMIT,
            "preserve_insertion_order": False,
            "autoinstall_known_extensions": False,
            "autoload_known_extensions": False,
        }
    )
    db.execute(f"CREATE TABLE data AS SELECT * FROM {READERS[format]}", [path])
    db.execute("SET enable_external_access = false")
    print_progress(READ_PERCENT)
    types = [(name, type_of(declared)) for name, declared, *_ in db.execute("DESCRIBE data").fetchall()]
    if len(types) > MAX_COLUMNS:
        return {"rejected": f"Table exceeds the maximum of {MAX_COLUMNS} columns"}
    rows = db.execute("SELECT count(*) FROM data").fetchone()[0]
    columns = list(describe_columns(db, types))
    correlated = list(correlations(db, [column["name"] for column in columns if column["type"] in NUMERIC_TYPES]))
    return {
        "rows": rows,
        "columns": columns,
        "correlations": correlated,
        "insights": list(insights(rows, columns, correlated)),
    }


def print_progress(percent: float) -> None:
    sys.stdout.write(f"{percent:.1f}\n")
    sys.stdout.flush()


def type_of(declared: str) -> str:
    if not declared.endswith("]"):
        for name, prefixes in TYPE_PREFIXES.items():
            if declared.startswith(prefixes):
                return name
    return "json"


def describe_columns(db: Any, types: list[tuple[str, str]]) -> Iterator[dict[str, Any]]:
    for number, (name, type) in enumerate(types, 1):
        yield describe_column(db, name, type)
        print_progress(READ_PERCENT + (DESCRIBED_PERCENT - READ_PERCENT) * number / len(types))


def describe_column(db: Any, name: str, type: str) -> dict[str, Any]:
    expression = value_expression(name, type)
    nulls, distinct, minimum, maximum = db.execute(
        f"SELECT count(*) - count({expression}), count(DISTINCT {expression}), min({expression}), max({expression}) "
        f"FROM data"
    ).fetchone()
    mean = std = quartiles = None
    if type in NUMERIC_TYPES:
        mean, std, quartiles = db.execute(
            f"SELECT avg(x), stddev_samp(x), quantile_cont(x, [0.25, 0.5, 0.75]) "
            f"FROM (SELECT CAST({expression} AS DOUBLE) AS x FROM data)"
        ).fetchone()
    top = db.execute(
        f"SELECT {expression}, count(*) FROM data WHERE {expression} IS NOT NULL "
        f"GROUP BY 1 ORDER BY 2 DESC, 1 LIMIT {MAX_TOP_VALUES}"
    ).fetchall()
    return {
        "name": name,
        "type": type,
        "nulls": nulls,
        "distinct": distinct,
        "min": to_json_value(minimum),
        "max": to_json_value(maximum),
        "mean": to_json_value(mean),
        "std": to_json_value(std),
        "quartiles": [to_json_value(quartile) for quartile in quartiles] if quartiles else None,
        "top": [{"value": to_json_value(value), "count": count} for value, count in top],
    }


def correlations(db: Any, numbers: list[str]) -> Iterator[dict[str, Any]]:
    """Yield Pearson's coefficient of every pair of the first numeric columns, except constant columns."""
    pairs = list(combinations(numbers[:MAX_CORRELATED_COLUMNS], 2))
    if not pairs:
        return
    coefficients = ", ".join(f"corr({finite_or_null(a)}, {finite_or_null(b)})" for a, b in pairs)
    for pair, coefficient in zip(pairs, db.execute(f"SELECT {coefficients} FROM data").fetchone(), strict=True):
        if to_json_value(coefficient) is not None:
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
        yield from describe_outliers(column)
    for correlation in correlated:
        if abs(correlation["coefficient"]) >= MIN_STRONG_CORRELATION:
            a, b = correlation["columns"]
            direction = "rises" if correlation["coefficient"] > 0 else "falls"
            yield f"{b} {direction} with {a} (correlation {correlation['coefficient']:.2f})"


def describe_outliers(column: dict[str, Any]) -> Iterator[str]:
    """Describe far outliers: values beyond Tukey's outer fences."""
    if column["quartiles"] is None or None in column["quartiles"] or column["min"] is None:
        return
    low, _, high = column["quartiles"]
    reach = 3 * (high - low)
    if reach and column["max"] > high + reach:
        yield f"{column['name']} has values far above the rest, up to {column['max']}"
    if reach and column["min"] < low - reach:
        yield f"{column['name']} has values far below the rest, down to {column['min']}"


def to_json_value(value: Any) -> Any:
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
    return text if len(text) <= MAX_VALUE_CHARACTERS else text[:MAX_VALUE_CHARACTERS] + "…"


def value_expression(name: str, type: str) -> str:
    if type == "json":
        return f"CAST({quote_identifier(name)} AS VARCHAR)"
    return finite_or_null(name) if type == "number" else quote_identifier(name)


def finite_or_null(name: str) -> str:
    """Return an SQL expression in which NaN and infinity count as missing."""
    return f"CASE WHEN isfinite(CAST({quote_identifier(name)} AS DOUBLE)) THEN {quote_identifier(name)} END"


def quote_identifier(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


if __name__ == "__main__":
    main()
