"""Names for W&B: within its limits, the same where they fit, and still different where they do not.

Truth: the limits of W&B's server, and its client's own check of a project's name.

Run: make test ARGS=tests/tracking/test_names.py
"""

import re

import pytest
from wandb.sdk.artifacts._validators import validate_project_name

from lora_lab.config.schema import Tracking
from lora_lab.tracking.names import shortened, tags_of

NAMES = ["digits", "*.layer.[0-3].query", "zwei Wörter", "研究" * 32, "a" * 64, "b" * 128]


@pytest.mark.parametrize("name", NAMES)
def test_a_name_that_fits_stays(name: str):
    assert shortened(name) == name


@pytest.mark.parametrize("start", ["a" * 200, "研究 " * 60, "*.fc" * 50])
def test_a_long_name_stays_readable_and_unique(start: str):
    one, other = shortened(f"{start}-seed0"), shortened(f"{start}-seed1")
    assert one != other
    for name in (one, other):
        assert len(name) == 128
        assert name.startswith(start[:119])


@pytest.mark.parametrize(
    ("names", "tags"),
    [
        (("a", "b", "a"), ["a", "b"]),
        (("", " ", "two\nlines"), ["two lines"]),
        (("*.fc*", "größe"), ["*.fc*", "größe"]),
    ],
)
def test_tags(names: tuple[str, ...], tags: list[str]):
    assert tags_of(names) == tags


def test_long_tags_are_short_and_unique():
    tags = tags_of([f"{'x' * 70}{i}" for i in range(3)])
    assert len(set(tags)) == 3
    assert {len(tag) for tag in tags} == {64}


@pytest.mark.parametrize(
    "name", ["p", "my project", "größe", "p" * 128, "p" * 129, *"/\\#?%:", "a\nb", "a\rb"]
)
def test_a_project_is_taken_where_wandb_takes_it(name: str):
    def takes(check: object) -> bool:
        try:
            check(name)  # pyright: ignore
        except ValueError:
            return False
        return True

    settings = Tracking.model_fields["project"].metadata
    (pattern,) = [rule.pattern for rule in settings if hasattr(rule, "pattern")]
    assert bool(re.fullmatch(pattern, name)) == takes(validate_project_name)
