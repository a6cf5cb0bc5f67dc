"""A row of a data set, and where it is."""

from typing import Any

Row = dict[str, Any]
"""A row as its file has it, or normalised: `text`; `messages`; `prompt`, `chosen` and `rejected`; or `prompt`,
`completion` and `label`. Conversations have `tools` too, where the row declares any."""

Message = dict[str, Any]
"""`role` and `content`, and `tool_calls` of an assistant that calls tools."""

Messages = list[Message]

Tools = list[dict[str, Any]]
"""Tools that a conversation declares, in OpenAI's form."""

Placed = tuple[str, Row]
"""A row and its place, as `path:12` or `path: row 12`."""


class RowError(Exception):
    """What is wrong with one row; the message needs no place."""
