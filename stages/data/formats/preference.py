"""A better and a worse answer to the same prompt: `chosen` and `rejected`, each text or messages."""

from stages.data.formats._tools import with_tools
from stages.data.formats._turns import MessageNames, as_messages, in_order, prompt
from stages.data.row import FileRow, Message, Messages, Row, RowError

NEEDED = ("chosen", "rejected")
OPTIONAL = ("prompt", "instruction", "input", "history", "conversations", "system", "tools")


def normalise(row: FileRow, names: MessageNames) -> Row:
    before_chosen, chosen = _answer(row, "chosen", names)
    before_rejected, rejected = _answer(row, "rejected", names)
    if before_chosen and before_rejected and before_chosen != before_rejected:
        raise RowError("`chosen` and `rejected` differ before their last message; only that one may differ")
    if _stripped(chosen) == _stripped(rejected):
        raise RowError("`chosen` and `rejected` are the same; a pair must differ to teach anything")
    asked = _longer(prompt(row, names), before_chosen or before_rejected)
    return with_tools(row, {"prompt": asked, "chosen": [chosen], "rejected": [rejected]})


def _answer(row: FileRow, column: str, names: MessageNames) -> tuple[Messages, Message]:
    """The messages before the last one of `chosen` or `rejected`, and the last one. Raises RowError."""
    messages = as_messages(row[column], column, names, "assistant")
    if len(messages) != 1:
        messages = in_order(messages, f"`{column}`", "assistant")
    if messages[-1]["role"] != "assistant":
        raise RowError(f"`{column}` is from the {messages[-1]['role']}; it must be the assistant's answer")
    return messages[:-1], messages[-1]


def _stripped(answer: Message) -> Message:
    return {**answer, "content": answer["content"].strip()}


def _longer(asked: Messages, before: Messages) -> Messages:
    """The longer of the row's prompt and the messages before its answers; the shorter must be the end of the longer.

    Raises:
        RowError: both are empty, or they are different prompts.
    """
    short, long = sorted((asked, before), key=len)
    if not long:
        raise RowError("the row has no prompt; give `prompt`, `instruction` or `conversations`")
    if long[len(long) - len(short) :] != short:
        raise RowError("`chosen` and `rejected` answer another prompt than the row's; keep one of the two")
    return long
