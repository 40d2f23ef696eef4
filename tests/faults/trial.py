"""One fault that is brought about, and what came of it."""

import re
from dataclasses import dataclass, field

from tests.faults.commands import Result

BAD = ("lost", "unsaid", "traceback", "wrong end")
"""What can be bad about a trial; a trial with none of them is survived."""


@dataclass
class Trial:
    """One fault: its row of the table, what was done, and what was bad about what came of it."""

    fault: str
    detail: str
    tried: int = 1
    """How many faults are brought about, as kills one after another."""
    skipped: str = ""
    """Why the fault could not be brought about here."""
    bad: dict[str, list[str]] = field(default_factory=dict)
    outputs: list[str] = field(default_factory=list)

    @property
    def survived(self) -> bool:
        """Whether nothing is bad."""
        return not self.bad

    def read(self, result: Result) -> Result:
        """Keeps a command's output, and looks for a traceback in it."""
        self.outputs.append(f"$ {result.command}\n{result.output}\n(exit code {result.code})")
        if "Traceback (most recent call last)" in result.output:
            self.note("traceback", result.command)
        if result.timed_out:
            self.note("wrong end", f"{result.command} did not end")
        return result

    def note(self, kind: str, reason: str) -> None:
        """Adds something bad."""
        self.bad.setdefault(kind, []).append(reason)

    def expect(self, is_right: bool, kind: str, reason: str) -> None:
        """Adds something bad where it is not right."""
        if not is_right:
            self.note(kind, reason)

    def description(self) -> str:
        """What was bad, with the ends of the outputs, for a person."""
        lines = [f"--- {self.fault}: {self.detail}"]
        lines += [f"{kind}: {reason}" for kind, reasons in self.bad.items() for reason in reasons]
        return "\n".join([*lines, *(output[-1500:] for output in self.outputs)])


def words(output: str) -> str:
    """An output as one line, with the lengths of times taken out."""
    return re.sub(r"\b[\d.]+ s\b", "N s", " ".join(output.split()))
