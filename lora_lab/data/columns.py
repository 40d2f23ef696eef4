"""Texts, numbers, classes and lists of a table's columns, all checked before training."""

import re
from collections.abc import Sequence
from math import isfinite
from typing import Any, Literal

import torch
from torch import Tensor

from lora_lab.config.schema import nearest
from lora_lab.data.sources import Table
from lora_lab.data.tokens import IGNORED

Label = str | int

LabelArgument = Literal["label", "labels"]
"""The argument that names a column of classes: of one a row, or of a list in each row."""


def texts(table: Table, argument: str, name: str) -> list[str]:
    """The texts of a column. Raises ValueError, with the line, where one is missing or blank."""
    values = table.column(argument, name)
    for row, value in enumerate(values):
        _check_text(table, row, f"'{name}'", value)
    return values


def _check_text(table: Table, row: int, place: str, value: Any) -> None:
    if not isinstance(value, str):
        what = "missing" if value is None else f"a {type(value).__name__}, not a text"
        raise ValueError(f"{table.where(row)}: {place} is {what}")
    if not value.strip():
        raise ValueError(f"{table.where(row)}: {place} is an empty text")


def words(table: Table, argument: str, name: str) -> list[list[str]]:
    """The words of each row. Raises ValueError, with the line, where one is missing or blank."""
    values = lists(table, argument, name)
    for row, value in enumerate(values):
        for i, word in enumerate(value, 1):
            _check_text(table, row, f"word {i} of '{name}'", word)
    return values


def lists(table: Table, argument: str, name: str) -> list[list[Any]]:
    """The lists of a column. Raises ValueError, with the line, where one is missing or empty."""
    values = table.column(argument, name)
    for row, value in enumerate(values):
        if not isinstance(value, list):
            what = "missing" if value is None else f"a {type(value).__name__}, not a list"
            raise ValueError(f"{table.where(row)}: '{name}' is {what}")
        if not value:
            raise ValueError(f"{table.where(row)}: '{name}' is an empty list")
    return values


def numbers(table: Table, name: str) -> Tensor:
    """The numbers of a column (N, 1), for regression."""
    values = []
    for row, value in enumerate(table.column("label", name)):
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = float("nan")
        if not isfinite(number):
            shown = "missing" if value in (None, "") else f"{value!r}"
            raise ValueError(f"{table.where(row)}: '{name}' is {shown}, regression needs a number")
        values.append(number)
    return torch.tensor(values).unsqueeze(1)


def class_names(
    table: Table, name: str, classes: Sequence[Label] | None, argument: LabelArgument = "label"
) -> tuple[str, ...]:
    """The names of the classes in their order: `classes`, or else what the table says.

    That is the names of a ClassLabel column of `datasets`, or the sorted labels. So integers 0 …
    n−1 are their classes' indices.
    """
    if classes is not None:
        names = tuple(map(str, classes))
        if len(set(names)) != len(names) or len(names) < 2:
            raise ValueError(f"classes={list(classes)}: must be two or more, all different")
        return names
    labels = {label for _, _, label in _labels(table, name, argument)}
    if (stored := _stored_names(table, name)) is not None:
        return stored
    if len(kinds := {isinstance(label, str) for label in labels}) > 1:
        raise ValueError(
            f"{argument}={name}: {table.key}={table.path} has both numbers and texts in it"
        )
    names = sorted(labels, key=str if True in kinds else int)
    if len(names) < 2:
        raise ValueError(
            f"{argument}={name}: all {argument if argument == 'labels' else 'rows'} of"
            f" {table.key}={table.path} are '{names[0]}'"
        )
    return tuple(map(str, names))


def class_indices(
    table: Table,
    name: str,
    classes: tuple[str, ...],
    listed: bool,
    argument: LabelArgument = "label",
) -> Tensor:
    """The index in `classes` of each label (N,). Raises ValueError for one that has none.

    The labels of lists follow each other. Integers are indices themselves where the classes have
    been `listed` by the user, and none of their names is a number: classes=[neg,pos] with labels
    0 and 1. Of classes that are sorted labels nobody knows which one an integer means.
    """
    index_of = {label: i for i, label in enumerate(classes)}
    labels = _labels(table, name, argument)
    named_by_numbers = any(re.fullmatch(r"-?\d+", label) for label in classes)
    is_index = listed and not named_by_numbers and all(type(row[-1]) is int for row in labels)
    indices = []
    for row, place, label in labels:
        index = label if is_index else index_of.get(str(label))
        if not isinstance(index, int) or not 0 <= index < len(classes):
            shown = ", ".join(classes[:8]) + (", …" if len(classes) > 8 else "")
            origin = "the classes" if table.key == "train" else "the classes of training"
            raise ValueError(
                f"{table.where(row)}: {place} is '{label}', which is not in {origin}"
                f" ({shown}){nearest(label, classes)}{_listing_hint(label, listed, argument)}"
            )
        indices.append(index)
    return torch.tensor(indices)


def _listing_hint(label: Label, listed: bool, argument: LabelArgument) -> str:
    """How an integer label comes to mean one of the named classes, where these are not listed."""
    if listed or not isinstance(label, int):
        return ""
    return f"; data.classes=[NAME,…] says which class each integer of data.{argument} stands for"


def _stored_names(table: Table, name: str) -> tuple[str, ...] | None:
    """The class names that a ClassLabel column of the table holds, or one of lists of them."""
    feature = table.rows.features[name]
    names = getattr(getattr(feature, "feature", feature), "names", None)  # of lists, their items'
    return tuple(names) if names else None


def _labels(table: Table, name: str, argument: LabelArgument) -> list[tuple[int, str, Label]]:
    """The labels of a column, none of them missing; those of a ClassLabel column by name.

    Before each stand its row, and its place in it for messages.
    """
    if argument == "label":
        values = [(i, f"'{name}'", value) for i, value in enumerate(table.column(argument, name))]
    else:
        values = [
            (row, f"label {i} of '{name}'", value)
            for row, labels in enumerate(lists(table, argument, name))
            for i, value in enumerate(labels, 1)
        ]
    stored = _stored_names(table, name)
    return [(row, place, _label(table, row, place, value, stored)) for row, place, value in values]


def _label(table: Table, row: int, place: str, value: Any, stored: tuple[str, ...] | None) -> Label:
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # a CSV's integers beside missing ones
    # Hub sets mark the rows of a test split that has no labels with −1.
    if value is None or value == "" or value != value or (stored and value == -1):
        raise ValueError(f"{table.where(row)}: {place} is missing")
    if isinstance(value, list | dict | float):
        raise ValueError(f"{table.where(row)}: {place} is {value!r}, a class is a text or integer")
    if value == IGNORED:
        raise ValueError(f"{table.where(row)}: {place} is {value}, which in targets is no class")
    if stored and isinstance(value, int):
        return stored[value]
    return value if isinstance(value, str) else int(value)


def chats(table: Table, argument: str, name: str) -> list[list[dict[str, Any]]]:
    """The chats of a column, each a list of messages. Raises ValueError, with the line."""
    values = table.column(argument, name)
    for row, chat in enumerate(values):
        is_chat = isinstance(chat, list) and all(
            isinstance(turn, dict) and turn.get("role") and turn.get("content") is not None
            for turn in chat
        )
        if not is_chat or not chat:
            raise ValueError(
                f"{table.where(row)}: '{name}' is no chat, a list of"
                ' {"role": "user", "content": "…"}'
            )
        if all(turn["role"] != "assistant" for turn in chat):
            roles = dict.fromkeys(turn["role"] for turn in chat)
            raise ValueError(
                f"{table.where(row)}: no turn of '{name}' is the assistant's (roles:"
                f" {', '.join(roles)})"
            )
    # `datasets` gives all messages the keys of all, with None where a message lacks one.
    return [[{k: v for k, v in turn.items() if v is not None} for turn in chat] for chat in values]
