"""README, CONTRIBUTING and docs/: every link and every file and function they name exists.

Truth: the files of the repository and the syntax trees of the package.
Run: make test ARGS=tests/test_docs.py
"""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def names_in(file: Path) -> set[str]:
    """Functions, classes, constants and `Class.method` of a Python file."""
    names: set[str] = set()
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            names |= {f"{node.name}.{m.name}" for m in node.body if isinstance(m, ast.FunctionDef)}
        if isinstance(node, ast.Assign):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    return names


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page: Path):
    for link in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
        is_generated = link.startswith("reference/") or "/reference/" in link
        if not link.startswith("http") and not is_generated:  # tests/docs/test_reference.py
            assert (page.parent / link).exists(), link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_and_functions_exist(page: Path):
    spans = re.findall(r"`([\w./]+\.py)(?:: ([\w.]+))?`", page.read_text())
    for path, name in spans:
        # mine/ has files that docs/tutorials/own-project.md has one write.
        if "NAME" in path or path.startswith("mine/"):
            continue
        file = next((f for f in (ROOT / "lora_lab" / path, ROOT / path) if f.exists()), None)
        assert file is not None, path
        assert not name or name in names_in(file), f"{path}: {name}"
