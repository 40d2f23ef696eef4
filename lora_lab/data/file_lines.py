"""Where each row of a file stands in it, and which of its lines is broken: for messages."""

import csv
import json
from collections.abc import Iterator
from pathlib import Path

from lora_lab.data.content import FORMATS


def broken_line(file: Path) -> str | None:
    """What is wrong with the first line that is no UTF-8 or, in JSONL, no JSON object."""
    if FORMATS[file.suffix] == "parquet":
        return None
    for number, line in enumerate(file.read_bytes().split(b"\n"), 1):
        where = f", {file.name} line {number}: "
        try:
            text = line.decode()
            if file.suffix == ".jsonl" and text.strip():
                row = json.loads(text)
                if not isinstance(row, dict):
                    return f"{where}a row is a JSON object, this is a {type(row).__name__}"
        except UnicodeDecodeError as error:
            return f"{where}no UTF-8 text (byte {line[error.start]:#x})"
        except json.JSONDecodeError as error:
            return f"{where}broken JSON: {error.msg}, column {error.colno}"
    return None


def lines_of_rows(file: Path, has_header: bool = True) -> Iterator[str]:
    """The place of each row in a file: `line 3`, or `row 3` where rows are not lines.

    `has_header`: the first line of a CSV or TSV file names the columns.
    """
    kind = FORMATS[file.suffix]
    if kind == "parquet":
        from pyarrow import parquet

        yield from (f"row {i + 1}" for i in range(parquet.read_metadata(file).num_rows))
    elif kind == "csv":
        with file.open(newline="") as stream:
            reader = csv.reader(stream, delimiter="\t" if file.suffix == ".tsv" else ",")
            line = 1
            for i, fields in enumerate(reader):
                if (i or not has_header) and fields:  # blank lines are no rows
                    yield f"line {line}"
                line = reader.line_num + 1
    elif kind == "text":
        yield "the file"
    elif file.suffix == ".jsonl":
        lines = enumerate(file.read_text().split("\n"), 1)
        yield from (f"line {number}" for number, line in lines if line.strip())
