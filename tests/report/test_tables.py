"""Numbers and tables as text, LaTeX, Markdown and CSV, with all kinds of special characters.

Truth: pdflatex, where it is installed; Python's csv reader; markdown-it, a parser of Markdown;
roundings written by hand.

Run: make test ARGS=tests/report/test_tables.py
"""

import csv
import io
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from markdown_it import MarkdownIt

from lora_lab.console import VisibleConsole
from lora_lab.report.printed_tables import simple_table
from lora_lab.report.tables import (
    LATEX_SIGNS,
    csv_of,
    format_mean_std,
    is_numeric,
    latex,
    markdown,
    terminal_table,
)

HARD = [
    ["r", "val/loss", "a_b & c", "50 % # $x$", r"path\to {x}", "~ ^ < > |"],
    ["1", "**0.5 ± 0.1**", "*.fc1", "[16]", "{'*.fc*': 2}", 'lr="1e-3"'],
    ["–", "σ_1 φ(1, 1) Δ θ √ ×", "é ü 日本 → ≤", "**", "a\nb", "-1 − 2 …"],
]


def test_latex_escapes_its_special_characters():
    body = latex([["".join(LATEX_SIGNS)], ["\\"], ["x_1^2 {y} ~ 5% & #3 $"]])
    lines = body.splitlines()[2:-2]
    assert lines[-1] == (r"x\_1\textasciicircum{}2 \{y\} \textasciitilde{} 5\% \& \#3 \$ \\")
    assert lines[-2] == r"\textbackslash{} \\"
    for line in lines:
        known = re.sub(r"\\[A-Za-z]+(\{\})?|\\[&%_#${}\\|]|\$[^$]*\$", "", line)
        assert not re.search(r"[\\{}$&#^_%~<>|]", known), line
        assert known.isascii()


def test_a_marked_cell_is_bold():
    assert r"\textbf{0.5 $\pm$ 0.1}" in latex(HARD)
    assert latex(HARD).count("textbf") == 1
    assert "{[16]}" in latex([["a"], ["[16]"]]), "a bracket after \\\\ would be its argument"


@pytest.mark.skipif(not shutil.which("pdflatex"), reason="pdflatex is not installed")
def test_latex_compiles():
    document = "\\documentclass{article}\\usepackage{booktabs}\\begin{document}\n"
    Path("table.tex").write_text(document + latex(HARD) + "\\end{document}\n")
    done = subprocess.run(
        ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "table.tex"],
        capture_output=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout.decode(errors="replace")[-2000:]


def test_csv_and_markdown_keep_every_cell():
    read = list(csv.reader(io.StringIO(csv_of(HARD))))
    shown = [[c.strip("*") if c.startswith("**0") else c for c in row] for row in HARD]
    shown[-1][-1] = "'-1 − 2 …"  # which a spreadsheet would compute
    assert read == shown
    for line in markdown([["a|b", "\\"], ["1", "2"]], "l").splitlines():
        assert len(re.findall(r"(?<!\\)\|", line)) == 3


@pytest.mark.parametrize(
    ("mean", "std", "text"),
    [
        (0.61759, 0.0032, "0.6176 ± 0.0032"),
        (9.6917, 1.7, "9.7 ± 1.7"),
        (0.5, 0.0996, "0.50 ± 0.10"),
        (123456.0, 1234.0, "123,500 ± 1,200"),
        (0.001, 20.0, "0 ± 20"),
        (-4.2204e-14, 4.9e-16, "-4.220e-14 ± 4.9e-16"),
        (0.29166666624, 7.01e-10, "0.29166666624 ± 7.0e-10"),
        (0.29167, 0.0, "0.29167 ± 0"),
    ],
)
def test_a_deviation_has_two_digits_and_its_mean_the_same_place(mean: float, std: float, text: str):
    assert format_mean_std(mean, std) == text
    assert is_numeric([text, "–", f"**{text}**"])


HOSTILE = [
    *("=1+1", "+cmd|' /C calc'!A0", "-2+3", "@SUM(A1)", "\t=1", "<script>x</script>", "[x](y)"),
    *("![x][y]", "a\nb", "\x1b[31mred", "\x9b2J", "\u202egpj.exe", "[red]x", "[/]", "a|b"),
]
"""Names that a spreadsheet, a browser, a terminal or rich would run."""


@pytest.mark.parametrize("name", HOSTILE)
def test_a_name_is_only_shown(name: str):
    rows = [["name", "loss"], [name, "-1.5"], [f"**{name}**", "-1.5 ± 0.1"]]
    for first, number in csv.reader(csv_of(rows).splitlines(keepends=True)):
        assert first[0] not in "=+-@\t\r"
        assert number == "loss" or number.startswith("-1.5")
    text = markdown(rows, "l")
    assert len(text.splitlines()) == 4
    html = MarkdownIt("js-default", {"html": True}).render(text)
    assert not re.search(r"<(script|a|img)", html)
    assert html.count("<td") == 4
    shown = io.StringIO()
    console = VisibleConsole(file=shown, force_terminal=True, color_system=None, width=80)
    for table in (terminal_table(name, rows), simple_table(rows[0], rows[1:])):
        console.print(table)
    console.print(name, markup=False)
    printed = shown.getvalue()
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", printed.replace("\x1b[0m", ""))
    assert re.split(r"[\x00-\x1f\x7f-\x9f\u202e]", name)[-1] in printed
