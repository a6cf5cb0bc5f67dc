"""A better and a worse answer to the same: `chosen` and `rejected`, each text or messages."""

from stages.data.formats._tools import with_tools
from stages.data.formats._turns import Words, in_turn, prompt, turns
from stages.data.row import Message, Messages, Row, RowError

NEEDED = ("chosen", "rejected")
OPTIONAL = ("prompt", "instruction", "input", "history", "conversations", "system", "tools")


def normal(row: Row, words: Words) -> Row:
    (before, chosen), (other, rejected) = _answer(row, "chosen", words), _answer(row, "rejected", words)
    if before and other and before != other:
        raise RowError("`chosen` and `rejected` differ before their last message; only that one may differ")
    if _said(chosen) == _said(rejected):
        raise RowError("`chosen` and `rejected` are the same; a pair must differ to teach anything")
    asked = _longer(prompt(row, words), before or other)
    return with_tools(row, {"prompt": asked, "chosen": [chosen], "rejected": [rejected]})


def _said(answer: Message) -> Message:
    return {**answer, "content": answer["content"].strip()}


def _longer(asked: Messages, before: Messages) -> Messages:
    """The prompt column and what comes before the answers, of which one must end the other."""
    short, long = sorted((asked, before), key=len)
    if not long:
        raise RowError("the row has no prompt; give `prompt`, `instruction` or `conversations`")
    if long[len(long) - len(short) :] != short:
        raise RowError("`chosen` and `rejected` answer another prompt than the row's; keep one of the two")
    return long


def _answer(row: Row, name: str, words: Words) -> tuple[Messages, Message]:
    """What comes before the last message of `chosen` or `rejected`, and that message."""
    said = turns(row[name], name, words, "assistant")
    if len(said) != 1:
        said = in_turn(said, f"`{name}`", "assistant")
    if said[-1]["role"] != "assistant":
        raise RowError(f"`{name}` is from the {said[-1]['role']}; it must be the assistant's answer")
    return said[:-1], said[-1]
