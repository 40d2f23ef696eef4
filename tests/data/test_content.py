"""The hash of files and folders: it is of their bytes, and names no path.

Truth: hashlib over the bytes. Run: make test ARGS=tests/data/test_content.py
"""

import hashlib
import shutil
from pathlib import Path

import pytest

from lora_lab.data import content
from lora_lab.data.sources import content_hash


def test_a_file_is_its_bytes():
    Path("a.jsonl").write_bytes(b"one")
    assert content_hash("a.jsonl") == hashlib.sha256(b"one").hexdigest()
    Path("a.jsonl").write_bytes(b"other")
    assert content_hash("a.jsonl") == hashlib.sha256(b"other").hexdigest()
    assert content_hash("a.jsonl:test") == f"{hashlib.sha256(b'other').hexdigest()}:test"


def test_a_file_is_read_once(monkeypatch: pytest.MonkeyPatch):
    Path("a.jsonl").write_bytes(b"one")
    first = content_hash("a.jsonl")
    monkeypatch.setattr(content.hashlib, "file_digest", None)
    assert content_hash("a.jsonl") == first


def test_a_folder_is_its_files_wherever_it_lies():
    Path("x/inner").mkdir(parents=True)
    for name, text in (("a.txt", "a"), ("inner/b.txt", "b"), ("model.safetensors", "w")):
        Path("x", name).write_text(text)
    first, tokenizer = content_hash("x"), content_hash("x", kind="tokenizer")
    shutil.copytree("x", "y")
    Path("y/.hidden").write_text("h")
    assert content_hash("y") == first
    Path("y/model.safetensors").write_text("other")
    assert content_hash("y") != first
    assert content_hash("y", kind="tokenizer") == tokenizer
    Path("y/inner/b.txt").rename("y/b.txt")
    assert content_hash("y", kind="tokenizer") != tokenizer


def test_what_is_neither_here_nor_on_a_hub(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", _offline)
    with pytest.raises(ValueError, match=r"org/set: no file or folder here.*no hub is reachable"):
        content_hash("org/set")
    commit = "0123456789" * 4
    assert content_hash("org/set", commit) == commit
    Path("train.jsonl").touch()
    with pytest.raises(ValueError, match=r"^tran.jsonl: no such file or folder; nearest: train"):
        content_hash("tran.jsonl")
    with pytest.raises(ValueError, match="a/b/c: no such file, nor is there a folder a/b"):
        content_hash("a/b/c")


def _offline(*_: object, **__: object) -> None:
    raise ConnectionError("Name or service not known")
