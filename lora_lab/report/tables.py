"""How numbers and tables are written: Markdown, CSV, LaTeX. A table's first row is its head."""

import csv
import io
from collections.abc import Iterable, Sequence
from statistics import mean, stdev

Rows = list[list[str]]


def number(value: float | None) -> str:
    """Five significant digits, an en dash for what is not there."""
    if value is None:
        return "–"
    return f"{value:,.0f}" if float(value).is_integer() and abs(value) < 1e15 else f"{value:.5g}"


def markdown(rows: Rows, align: str) -> str:
    """Rows as a Markdown table, the first its head."""
    rule = ["---:" if align == "r" else "---"] * len(rows[0])
    return "\n".join("| " + " | ".join(row) + " |" for row in (rows[0], rule, *rows[1:]))


def csv_of(rows: Iterable[list[str]]) -> str:
    """Rows as CSV."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


def latex(rows: Rows) -> str:
    """Rows as a tabular of booktabs, the first its head; `**` becomes bold."""

    def cell(text: str) -> str:
        for sign in "&%_#":
            text = text.replace(sign, f"\\{sign}")
        text = text.replace("±", r"$\pm$").replace("–", "--").replace("σ", r"$\sigma$")
        text = text.replace("φ", r"$\varphi$").replace("Δ", r"$\Delta$")
        return rf"\textbf{{{text.strip('*')}}}" if text.startswith("**") else text

    head, *body = [" & ".join(map(cell, row)) + r" \\" for row in rows]
    columns = "l" + "r" * (len(rows[0]) - 1)
    lines = [rf"\begin{{tabular}}{{{columns}}}", r"\toprule", head, r"\midrule", *body]
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", ""])


def spread(values: Sequence[float]) -> str:
    """Mean ± standard deviation; the value alone of one."""
    return number(mean(values)) + (f" ± {number(stdev(values))}" if len(values) > 1 else "")
