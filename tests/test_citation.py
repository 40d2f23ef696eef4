"""CITATION.cff is valid, and of this version.

Truth: the keys that the Citation File Format 1.2.0 requires and those that it allows at the top,
https://github.com/citation-file-format/citation-file-format (schema guide), and pyproject.toml.
Run: make test ARGS=tests/test_citation.py
"""

import tomllib
from pathlib import Path

import yaml

import lora_lab

ROOT = Path(__file__).parents[1]
REQUIRED = {"authors", "cff-version", "message", "title"}
ALLOWED = REQUIRED | {
    *(
        "abstract",
        "commit",
        "contact",
        "date-released",
        "doi",
        "identifiers",
        "keywords",
        "license",
    ),
    *("license-url", "preferred-citation", "references", "repository", "repository-artifact"),
    *("repository-code", "type", "url", "version"),
}


def test_the_citation_is_valid_and_of_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert REQUIRED <= set(citation) <= ALLOWED
    assert citation["cff-version"] == "1.2.0"
    assert citation["type"] in ("software", "dataset")
    assert all(set(author) >= {"name"} for author in citation["authors"])
    assert len(set(citation["keywords"])) == len(citation["keywords"])
    assert citation["license"] == project["license"]
    assert citation["version"] == project["version"] == lora_lab.__version__
