"""DATA_ANALYSIS in a process of its own, which may be killed: ``analysis.py PARENT FILE FORMAT`` prints how far it
is, 0–100, a line each, and JSON in the last.

Started with nothing of ours in reach: no package, no environment, its own directory. What the data say is theirs;
no SQL comes from outside. ``{"refused": why}`` where the file is not what it is said to be.
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

MEMORY = "48MB"  # DuckDB's own; beyond it goes to the directory. The process stays within 128 MB for 10 MB of CSV.
DISK = "512MB"
ADDRESS_SPACE = 2 << 30
FILE_BYTES = 1 << 30
CPU_SECONDS = 110
MOST_COLUMNS = 200
MOST_CORRELATED = 20  # columns
TOP = 5
SHOWN_CHARACTERS = 200
STRONG = 0.7
READ_PERCENT, DESCRIBED_PERCENT = 30, 90  # of the time it takes, roughly
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
        told = analyse(duckdb, path, format)
    except duckdb.Error as error:
        # The first line says what is wrong; the others name our paths and options.
        told = {"refused": str(error).splitlines()[0].replace(path, "the data")[:500]}
    json.dump(told, sys.stdout, allow_nan=False)


def confine(parent: int) -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # the worker died in between
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
    described = [(name, type_of(declared)) for name, declared, *_ in db.execute("DESCRIBE data").fetchall()]
    if len(described) > MOST_COLUMNS:
        return {"refused": f"more than {MOST_COLUMNS} columns"}
    rows = db.execute("SELECT count(*) FROM data").fetchone()[0]
    columns = list(columns_of(db, described))
    correlated = list(correlations(db, [each["name"] for each in columns if each["type"] in NUMBERS]))
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


def columns_of(db: Any, described: list[tuple[str, str]]) -> Iterator[dict[str, Any]]:
    for number, (name, type) in enumerate(described, 1):
        yield column(db, name, type)
        reached(READ_PERCENT + (DESCRIBED_PERCENT - READ_PERCENT) * number / len(described))


def column(db: Any, name: str, type: str) -> dict[str, Any]:
    it = value_of(name, type)
    nulls, distinct, least, most = db.execute(
        f"SELECT count(*) - count({it}), count(DISTINCT {it}), min({it}), max({it}) FROM data"
    ).fetchone()
    mean = std = quartiles = None
    if type in NUMBERS:
        mean, std, quartiles = db.execute(
            f"SELECT avg(x), stddev_samp(x), quantile_cont(x, [0.25, 0.5, 0.75]) "
            f"FROM (SELECT CAST({it} AS DOUBLE) AS x FROM data)"
        ).fetchone()
    top = db.execute(
        f"SELECT {it}, count(*) FROM data WHERE {it} IS NOT NULL GROUP BY 1 ORDER BY 2 DESC, 1 LIMIT {TOP}"
    ).fetchall()
    return {
        "name": name,
        "type": type,
        "nulls": nulls,
        "distinct": distinct,
        "min": shown(least),
        "max": shown(most),
        "mean": shown(mean),
        "std": shown(std),
        "quartiles": [shown(each) for each in quartiles] if quartiles else None,
        "top": [{"value": shown(value), "count": count} for value, count in top],
    }


def correlations(db: Any, numbers: list[str]) -> Iterator[dict[str, Any]]:
    """Pearson's, of every pair of the first numeric columns; none where one of them does not vary."""
    pairs = list(combinations(numbers[:MOST_CORRELATED], 2))
    if not pairs:
        return
    asked = ", ".join(f"corr({finite(a)}, {finite(b)})" for a, b in pairs)
    for pair, coefficient in zip(pairs, db.execute(f"SELECT {asked} FROM data").fetchone(), strict=True):
        if shown(coefficient) is not None:
            yield {"columns": list(pair), "coefficient": round(coefficient, 6)}


def insights(rows: int, columns: list[dict[str, Any]], correlated: list[dict[str, Any]]) -> Iterator[str]:
    yield f"{rows} rows, {len(columns)} columns"
    for each in columns:
        name, filled = each["name"], rows - each["nulls"]
        if rows and not filled:
            yield f"{name} is empty"
        elif each["nulls"]:
            yield f"{name} is missing in {each['nulls']} of {rows} rows ({100 * each['nulls'] / rows:.1f} %)"
        if filled > 1 and each["distinct"] == 1:
            yield f"{name} is always {each['min']}"
        elif filled > 1 and each["distinct"] == rows:
            yield f"{name} is different in every row"
        elif filled > 1 and each["top"] and each["top"][0]["count"] > filled / 2:
            yield f"{name} is mostly {each['top'][0]['value']} ({100 * each['top'][0]['count'] / filled:.0f} %)"
        yield from spread(each)
    for each in correlated:
        if abs(each["coefficient"]) >= STRONG:
            a, b = each["columns"]
            how = "rises" if each["coefficient"] > 0 else "falls"
            yield f"{b} {how} with {a} (correlation {each['coefficient']:.2f})"


def spread(each: dict[str, Any]) -> Iterator[str]:
    """Values far outside of the middle half (Tukey's fences, the far ones)."""
    if each["quartiles"] is None or None in each["quartiles"] or each["min"] is None:
        return
    low, _, high = each["quartiles"]
    reach = 3 * (high - low)
    if reach and each["max"] > high + reach:
        yield f"{each['name']} has values far above the rest, up to {each['max']}"
    if reach and each["min"] < low - reach:
        yield f"{each['name']} has values far below the rest, down to {each['min']}"


def shown(value: Any) -> Any:
    """As JSON and the record can hold it."""
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
    """What is no number, or no end of one, counts as missing."""
    return f"CASE WHEN isfinite(CAST({quoted(name)} AS DOUBLE)) THEN {quoted(name)} END"


def quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


if __name__ == "__main__":
    main()
