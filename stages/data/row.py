"""Types of a row of a data set: as its file has it, and normalised."""

from typing import Any

FileRow = dict[str, Any]
"""A row as its file has it: the file's column names and values."""

Row = dict[str, Any]
"""A normalised row: `text`; `messages`; `prompt`, `chosen` and `rejected`; or `prompt`, `completion` and `label`.
A conversation also has `tools` where its row declares any."""

Message = dict[str, Any]
"""`role` and `content`; of the assistant also `reasoning_content`, the thought before its words; `tool_calls`; and
`weight` 0 where the message is in the prompt only."""

Messages = list[Message]

Tools = list[dict[str, Any]]
"""The tools that a conversation declares, in OpenAI's form."""

PlacedRow = tuple[str, Row]
"""Where a row is, as `path:12` or `path: row 12`, and the row."""


def is_trained(message: Message) -> bool:
    """Whether a message is in the loss when its conversation is trained on."""
    return message["role"] == "assistant" and message.get("weight") != 0


def message_texts(message: Message) -> list[str]:
    """The thought, if there is one, and the words of a message."""
    thought = message.get("reasoning_content")
    return [message["content"]] if thought is None else [thought, message["content"]]


class RowError(Exception):
    """What is wrong with one row. The message does not name the row's place; the caller adds it."""


class NotAnObject(RowError):
    """A row that is not an object, but a list of messages perhaps, which some formats read."""

    def __init__(self, value: object, message: str) -> None:
        super().__init__(message)
        self.value = value

    def __reduce__(self) -> tuple[type["NotAnObject"], tuple[object, str]]:
        return NotAnObject, (self.value, str(self))
