"""How numbers and tables are written: as text, Markdown, CSV, LaTeX and for the terminal.

A table is a list of rows of text, and its first row holds the column titles. A cell of the form
`**text**` is marked: it is the best of its column.
"""

import csv
import io
import math
import re
from collections.abc import Iterable

from rich import box
from rich.table import Table
from rich.text import Text

from lora_lab.console import visible

Rows = list[list[str]]
"""A table: the column titles, then the rows below them."""

NUMBER_PATTERN = re.compile(r"([-+]?(nan|inf|[\d.,]+(e[-+]?\d+)?)%?( (±|of) \S+)?|–)?")
"""What a cell of a column of numbers holds: `1,234`, `0.5 ± 0.1`, `2 of 3`, `–` or nothing."""

LATEX_SIGNS = {
    **{sign: f"\\{sign}" for sign in "&%_#${}"},
    **{"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"},
    **{"<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}"},
    **{"±": r"$\pm$", "×": r"$\times$", "·": r"$\cdot$", "−": "$-$", "√": r"$\surd$"},
    **{"≤": r"$\le$", "≥": r"$\ge$", "→": r"$\to$", "‖": r"$\|$", "Σ": r"$\Sigma$"},
    **{"Δ": r"$\Delta$", "σ": r"$\sigma$", "φ": r"$\varphi$", "θ": r"$\theta$", "α": r"$\alpha$"},
    **{"–": "--", "…": r"\dots{}", "₀": "$_0$", "²": "$^2$"},
}
"""LaTeX for the characters that are commands to it or that its fonts may lack."""


def format_number(value: float | None) -> str:
    """A number in five significant digits, an integer in full; – for None."""
    if value is None:
        return "–"
    return f"{value:,.0f}" if float(value).is_integer() and abs(value) < 1e15 else f"{value:.5g}"


def format_unit(value: float, unit: str) -> str:
    """A number in three significant digits with its decimal unit: 1234, "B" → 1.23 kB."""
    rounded = float(f"{value:.3g}")
    size, name = unit_of(rounded, unit)
    return f"{rounded / size:.3g} {name}"


def unit_of(value: float, unit: str) -> tuple[float, str]:
    """The decimal unit for a number of its size, and that unit's name: 1234, "B" → 1000, kB."""
    thousands = math.floor(math.log10(value) / 3) if value > 0 else 0
    prefixes = dict(enumerate(("µ", "m", "", "k", "M", "G", "T", "P", "E"), start=-2))
    thousands = min(max(thousands, min(prefixes)), max(prefixes))
    return 1000.0**thousands, f"{prefixes[thousands]}{unit}"


def format_seconds(seconds: float | None) -> str:
    """A duration in whole seconds, as `12 s`; – for None."""
    return "–" if seconds is None else f"{seconds:.0f} s"


def format_mean_std(mean: float, std: float | None) -> str:
    """`mean ± std`, std in two significant digits and both to the same place; None: the mean alone.

    As 0.61759 and 0.0032 → 0.6176 ± 0.0032.
    """
    if std is None:
        return format_number(mean)
    if std == 0:
        return f"{format_number(mean)} ± 0"
    # The exponent after rounding to two digits: 0.0996 becomes 0.10, so -1 and not -2.
    exponent = int(f"{std:.1e}".partition("e")[2])
    if 1e-6 <= std < 1e15:
        places = 1 - exponent
        shown = [f"{round(value, places):,.{max(0, places)}f}" for value in (mean, std)]
        return " ± ".join(shown)
    if 1e-3 <= abs(mean) < 1e15:
        return f"{mean:.{min(15, 1 - exponent)}f} ± {std:.1e}"
    mean_exponent = int(f"{mean:.1e}".partition("e")[2])
    return f"{mean:.{min(15, max(0, mean_exponent - exponent + 1))}e} ± {std:.1e}"


def is_numeric(column: Iterable[str]) -> bool:
    """Whether a column holds only numbers and blanks, so that it is aligned to the right."""
    return all(NUMBER_PATTERN.fullmatch(unmarked(text)) for text in column)


def unmarked(text: str) -> str:
    """A cell's text without the ** of a marked cell."""
    return text[2:-2] if is_marked(text) else text


def is_marked(text: str) -> bool:
    """Whether a cell is marked as the best of its column."""
    return len(text) > 4 and text.startswith("**") and text.endswith("**")


def markdown_text(text: str) -> str:
    """A text for Markdown, in which no HTML, link or end of a line is a name's own."""
    return visible(re.sub(r"[|\\<]|(?<=\])[(:\[]", r"\\\g<0>", " ".join(text.splitlines())))


def markdown(rows: Rows, align: str) -> str:
    """A table in Markdown, its columns aligned to the left (`align` "l") or right ("r")."""
    rule = ["---:" if align == "r" else "---"] * len(rows[0])
    escaped = [[markdown_text(text) for text in row] for row in rows]
    return "\n".join("| " + " | ".join(row) + " |" for row in (escaped[0], rule, *escaped[1:]))


def csv_of(rows: Iterable[list[str]]) -> str:
    """A table as CSV, without the marks of best cells.

    A text that a spreadsheet would compute, as =1+1 or @SUM(A1), has a ' before it; numbers stay.
    """
    text = io.StringIO()
    cells = ([visible(unmarked(cell)) for cell in row] for row in rows)
    writer = csv.writer(text, lineterminator="\n")
    writer.writerows([f"'{c}" if _is_formula(c) else c for c in row] for row in cells)
    return text.getvalue()


def _is_formula(text: str) -> bool:
    """Whether a spreadsheet takes a cell for a formula."""
    return text.lstrip().startswith(("=", "+", "-", "@")) and not NUMBER_PATTERN.fullmatch(text)


def latex(rows: Rows) -> str:
    """A table as a LaTeX tabular with the rules of booktabs; marked cells are bold."""

    def cell(text: str) -> str:
        # Below U+0180 are the Latin letters, which LaTeX's fonts have. Others become "?".
        escaped = "".join(
            LATEX_SIGNS.get(sign, sign if sign < "\u0180" and sign.isprintable() else "?")
            for sign in unmarked(text)
        )
        # [ or * at the start of a row would be read as an argument of the \\ that ends the row
        # before it: braces keep them apart.
        escaped = f"{{{escaped}}}" if escaped.startswith(("[", "*")) else escaped
        return rf"\textbf{{{escaped}}}" if is_marked(text) else escaped

    head, *body = [" & ".join(map(cell, row)) + r" \\" for row in rows]
    columns = "l" + "r" * (len(rows[0]) - 1)
    lines = [rf"\begin{{tabular}}{{{columns}}}", r"\toprule", head, r"\midrule", *body]
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", ""])


def terminal_table(title: str, rows: Rows) -> Table:
    """A table for the terminal: marked cells bold, columns of numbers to the right."""
    shown = Table(title=title, box=box.SIMPLE, pad_edge=False, title_justify="left")
    for i, heading in enumerate(rows[0]):
        right = i > 0 and is_numeric(row[i] for row in rows[1:])
        shown.add_column(Text(heading), justify="right" if right else "left")
    for row in rows[1:]:
        marked = [Text(unmarked(c), "bold") if is_marked(c) else Text(c) for c in row]
        shown.add_row(*marked)
    return shown
