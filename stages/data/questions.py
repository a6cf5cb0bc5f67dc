"""A question in any form that rows have, with or without an answer, in; the conversation before the answer out."""

from dataclasses import dataclass

from stages.data.formats._message import MessageForm
from stages.data.formats._tools import with_tools
from stages.data.formats._turns import as_messages, prompt, without_weights
from stages.data.formats._values import encodable, listed
from stages.data.row import FileRow, Messages, RowError, Tools

CONVERSATIONS = ("messages", "conversations")
QUESTIONS = ("prompt", "instruction", "question", "query", "input", "text")
"""Columns with a question, the first that a row has is taken."""
ANSWERS = ("completion", "output", "answer", "response", "reference", "chosen")
"""Columns with the answer that a person expects."""


@dataclass(frozen=True)
class Question:
    """What a model is asked."""

    messages: Messages
    tools: Tools | None = None
    reference: str | None = None
    """The answer in the row, if it has one."""


def as_question(row: FileRow, form: MessageForm | None = None) -> Question:
    """The question in a row, read as training reads it: the same messages give the same token ids.

    A conversation that ends with an answer is asked without it.

    Raises:
        RowError: the row holds no question, or one that no format allows.
    """
    form = form or MessageForm()
    column = next((column for column in (*CONVERSATIONS, *QUESTIONS) if row.get(column) not in (None, "")), None)
    if column is None:
        wanted = ", ".join(f"`{name}`" for name in (*CONVERSATIONS, *QUESTIONS))
        raise RowError(f"the row holds no question in one of {wanted}; it has {listed(list(row))}")
    reference = next((text for name in ANSWERS if (text := _words(row.get(name), f"`{name}`"))), None)
    given: FileRow = {name: row[name] for name in ("system", "history") if name in row}
    if column in CONVERSATIONS:
        messages = as_messages(row[column], column, form)
        if messages[-1]["role"] == "assistant" and len(messages) > 1:
            reference = messages[-1]["content"].strip() or None
            messages = messages[:-1]
        given["prompt"], form = messages, MessageForm()
    elif column == "instruction":
        given |= {name: row[name] for name in ("instruction", "input") if name in row}
    else:
        given["prompt"] = row[column]
    return Question(without_weights(prompt(given, form)), with_tools(row, {}).get("tools"), reference)


def _words(value: object, name: str) -> str | None:
    """Text, or the content of the last message. Raises RowError when it holds half a character."""
    if isinstance(value, list) and value and isinstance(value[-1], dict):
        value = value[-1].get("content", value[-1].get("value"))
    return encodable(value.strip(), name) or None if isinstance(value, str) else None
