"""How numbers and tables are written: Markdown, CSV, LaTeX. A table's first row is its head.

`**` around a cell marks the best of its column.
"""

import csv
import io
import re
from collections.abc import Iterable

Rows = list[list[str]]

NUMBER_PATTERN = re.compile(r"([-+]?(nan|inf|[\d.,]+(e[-+]?\d+)?)%?( (±|of) \S+)?|–)?")

LATEX_SIGNS = {
    **{sign: f"\\{sign}" for sign in "&%_#${}"},
    **{"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"},
    **{"<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}"},
    **{"±": r"$\pm$", "×": r"$\times$", "·": r"$\cdot$", "−": "$-$", "√": r"$\surd$"},
    **{"≤": r"$\le$", "≥": r"$\ge$", "→": r"$\to$", "‖": r"$\|$", "Σ": r"$\Sigma$"},
    **{"Δ": r"$\Delta$", "σ": r"$\sigma$", "φ": r"$\varphi$", "θ": r"$\theta$", "α": r"$\alpha$"},
    **{"–": "--", "…": r"\dots{}", "₀": "$_0$", "²": "$^2$"},
}
"""What LaTeX reads as its own, or its fonts may not have, and how that is said."""


def format_number(value: float | None) -> str:
    """Five significant digits, an en dash for what is not there."""
    if value is None:
        return "–"
    return f"{value:,.0f}" if float(value).is_integer() and abs(value) < 1e15 else f"{value:.5g}"


def format_mean_std(mean: float, std: float) -> str:
    """A mean ± a deviation of two significant digits, both to the same place."""
    if std == 0:
        return f"{format_number(mean)} ± 0"
    size = int(f"{std:.1e}".partition("e")[2])  # rounded: 0.0996 is 0.10
    if 1e-6 <= std < 1e15:
        places = 1 - size
        shown = [f"{round(value, places):,.{max(0, places)}f}" for value in (mean, std)]
        return " ± ".join(shown)
    if 1e-3 <= abs(mean) < 1e15:
        return f"{mean:.{min(15, 1 - size)}f} ± {std:.1e}"
    top = int(f"{mean:.1e}".partition("e")[2])
    return f"{mean:.{min(15, max(0, top - size + 1))}e} ± {std:.1e}"


def is_numeric(column: Iterable[str]) -> bool:
    """Whether a column has numbers alone, of which some may lack."""
    return all(NUMBER_PATTERN.fullmatch(unmarked(text)) for text in column)


def unmarked(text: str) -> str:
    """A cell without its mark."""
    return text[2:-2] if is_marked(text) else text


def is_marked(text: str) -> bool:
    """Whether a cell is marked as the best."""
    return len(text) > 4 and text.startswith("**") and text.endswith("**")


def markdown(rows: Rows, align: str) -> str:
    """Rows as a Markdown table, the first its head."""
    rule = ["---:" if align == "r" else "---"] * len(rows[0])
    escaped = [[re.sub(r"[|\\]", r"\\\g<0>", text) for text in row] for row in rows]
    return "\n".join("| " + " | ".join(row) + " |" for row in (escaped[0], rule, *escaped[1:]))


def csv_of(rows: Iterable[list[str]]) -> str:
    """Rows as CSV, without marks."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([unmarked(c) for c in row] for row in rows)
    return text.getvalue()


def latex(rows: Rows) -> str:
    """Rows as a tabular of booktabs, the first its head; what is marked is bold."""

    def cell(text: str) -> str:
        # Letters of the Latin alphabets are in LaTeX's fonts; of all else it may know nothing.
        escaped = "".join(
            LATEX_SIGNS.get(sign, sign if sign < "\u0180" and sign.isprintable() else "?")
            for sign in unmarked(text)
        )
        # A bracket that begins a row would be read as an argument of the \\ before it.
        escaped = f"{{{escaped}}}" if escaped.startswith(("[", "*")) else escaped
        return rf"\textbf{{{escaped}}}" if is_marked(text) else escaped

    head, *body = [" & ".join(map(cell, row)) + r" \\" for row in rows]
    columns = "l" + "r" * (len(rows[0]) - 1)
    lines = [rf"\begin{{tabular}}{{{columns}}}", r"\toprule", head, r"\midrule", *body]
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", ""])
