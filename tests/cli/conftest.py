"""Fixtures for the tests of subcommands."""

from collections.abc import Callable

import pytest

from tests.conftest import command

Run = Callable[..., tuple[int, str]]


@pytest.fixture
def lora_lab(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """lora_lab("cut", …) runs the command here, and gives its exit code and what it printed."""

    def run(*arguments: str) -> tuple[int, str]:
        code = command(monkeypatch, *arguments)
        printed = capsys.readouterr()
        assert "Traceback" not in printed.err
        return code, printed.out + printed.err

    return run
