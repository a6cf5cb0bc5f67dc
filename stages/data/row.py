"""Types of a row of a data set: as its file has it, and normalised."""

from typing import Any

FileRow = dict[str, Any]
"""A row as its file has it: the file's column names and values."""

Row = dict[str, Any]
"""A normalised row: `text`; `messages`; `prompt`, `chosen` and `rejected`; or `prompt`, `completion` and `label`.
A conversation also has `tools` where its row declares any."""

Message = dict[str, Any]
"""`role` and `content`, and `tool_calls` where the assistant calls tools."""

Messages = list[Message]

Tools = list[dict[str, Any]]
"""The tools that a conversation declares, in OpenAI's form."""

PlacedRow = tuple[str, Row]
"""Where a row is, as `path:12` or `path: row 12`, and the row."""


class RowError(Exception):
    """What is wrong with one row. The message does not name the row's place; the caller adds it."""
