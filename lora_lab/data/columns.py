"""Texts, numbers and classes of a table's columns, all checked before anything is trained."""

from collections.abc import Sequence
from math import isfinite
from typing import Any

import torch
from torch import Tensor

from lora_lab.config.schema import nearest
from lora_lab.data.sources import Table

Label = str | int


def texts(table: Table, argument: str, name: str) -> list[str]:
    """The texts of a column. Raises ValueError, with the line, where one is missing or blank."""
    values = table.column(argument, name)
    for row, value in enumerate(values):
        if not isinstance(value, str):
            what = "missing" if value is None else f"a {type(value).__name__}, not a text"
            raise ValueError(f"{table.where(row)}: '{name}' is {what}")
        if not value.strip():
            raise ValueError(f"{table.where(row)}: '{name}' is an empty text")
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


def class_names(table: Table, name: str, classes: Sequence[Label] | None) -> tuple[str, ...]:
    """The names of the classes in their order: `classes`, or else what the table says.

    That is the names of a ClassLabel column of `datasets`, or the sorted labels. So integers 0 …
    n−1 are their classes' indices.
    """
    if classes is not None:
        names = tuple(map(str, classes))
        if len(set(names)) != len(names) or len(names) < 2:
            raise ValueError(f"classes={list(classes)}: must be two or more, all different")
        return names
    labels = set(_labels(table, name))
    if (stored := _stored_names(table, name)) is not None:
        return stored
    if len(kinds := {isinstance(label, str) for label in labels}) > 1:
        raise ValueError(f"label={name}: {table.key}={table.path} has both numbers and texts in it")
    names = sorted(labels, key=str if True in kinds else int)
    if len(names) < 2:
        raise ValueError(f"label={name}: all rows of {table.key}={table.path} are '{names[0]}'")
    return tuple(map(str, names))


def class_indices(table: Table, name: str, classes: tuple[str, ...]) -> Tensor:
    """The index in `classes` of each row's label (N,). Raises ValueError for one that has none.

    Where no class has an integer label's name, the integer is the index itself.
    """
    index_of = {label: i for i, label in enumerate(classes)}
    labels = _labels(table, name)
    is_index = all(isinstance(label, int) and str(label) not in index_of for label in set(labels))
    indices = []
    for row, label in enumerate(labels):
        index = label if is_index else index_of.get(str(label))
        if not isinstance(index, int) or not 0 <= index < len(classes):
            shown = ", ".join(classes[:8]) + (", …" if len(classes) > 8 else "")
            origin = "the classes" if table.key == "train" else "the classes of training"
            raise ValueError(
                f"{table.where(row)}: '{name}' is '{label}', which is not in {origin}"
                f" ({shown}){nearest(label, classes)}"
            )
        indices.append(index)
    return torch.tensor(indices)


def _stored_names(table: Table, name: str) -> tuple[str, ...] | None:
    """The class names that a ClassLabel column of the table holds."""
    names = getattr(table.rows.features[name], "names", None)
    return tuple(names) if names else None


def _labels(table: Table, name: str) -> list[Label]:
    """The labels of a column, none of them missing; those of a ClassLabel column by name."""
    values = table.column("label", name)
    stored = _stored_names(table, name)
    return [_label(table, row, name, value, stored) for row, value in enumerate(values)]


def _label(table: Table, row: int, name: str, value: Any, stored: tuple[str, ...] | None) -> Label:
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # a CSV's integers beside missing ones
    # Hub sets mark the rows of a test split that has no labels with −1.
    if value is None or value == "" or value != value or (stored and value == -1):
        raise ValueError(f"{table.where(row)}: '{name}' is missing")
    if isinstance(value, list | dict | float):
        raise ValueError(f"{table.where(row)}: '{name}' is {value!r}, a class is a text or integer")
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
