"""A better and a worse answer to the same prompt: `chosen` and `rejected`, each text or messages."""

from stages.data.formats._message import MessageForm
from stages.data.formats._tools import with_tools
from stages.data.formats._turns import as_messages, in_order, prompt, refuse_untrained, with_context, without_weights
from stages.data.row import FileRow, Message, Messages, Row, RowError

NEEDED = ("chosen", "rejected")
OPTIONAL = ("prompt", "instruction", "input", "conversations", "system", "history", "tools")
ALSO = {
    "chosen": ("chosen_messages", "preferred_output"),
    "rejected": ("rejected_messages", "non_preferred_output"),
}

_OF_INPUT = ("messages", "tools", "parallel_tool_calls")  # the keys of `input` in OpenAI's form; the last has no effect


def normalise(row: FileRow, form: MessageForm) -> Row:
    if isinstance(row.get("input"), dict):
        row = _without_input(row, form)
    before_chosen, chosen = _answer(row, "chosen", form)
    before_rejected, rejected = _answer(row, "rejected", form)
    if before_chosen and before_rejected and before_chosen != before_rejected:
        raise RowError("`chosen` and `rejected` differ before their last message; only that one may differ")
    if chosen == rejected:
        raise RowError("`chosen` and `rejected` are the same; a pair must differ to teach anything")
    asked, before = without_weights(prompt(row, form)), before_chosen or before_rejected
    if asked:
        asked = _longer(asked, before)
    elif before:
        asked = without_weights(with_context(row, before, form))
    else:
        raise RowError("the row has no prompt; give `prompt`, `instruction` or `conversations`")
    return with_tools(row, {"prompt": asked, "chosen": [chosen], "rejected": [rejected]})


def _without_input(row: FileRow, form: MessageForm) -> FileRow:
    """A row of OpenAI's form, with prompt and tools in an object `input`, as one with `prompt` and `tools`.

    Raises:
        RowError: `input` has no messages, or the row has another prompt as well.
    """
    given, rest = row["input"], {name: value for name, value in row.items() if name != "input"}
    if "messages" not in given:
        raise RowError("`input` is an object without `messages`; it must be text, or have the `messages` of the prompt")
    for name in ("prompt", "instruction", "conversations"):
        if rest.get(name) is not None:
            raise RowError(f"the row has two prompts, `{name}` and the `messages` of `input`; keep one")
    form.unread.update(dict.fromkeys(f"input.{name}" for name in given if name not in _OF_INPUT))
    tools = {"tools": given["tools"]} if given.get("tools") else {}
    return {**rest, "prompt": given["messages"], **tools}


def _answer(row: FileRow, column: str, form: MessageForm) -> tuple[Messages, Message]:
    """The messages before the last one of `chosen` or `rejected`, and the last one. Raises RowError."""
    messages = as_messages(row[column], column, form, "assistant")
    if len(messages) != 1:
        messages = in_order(messages, f"`{column}`", "assistant", form)
    if messages[-1]["role"] != "assistant":
        raise RowError(f"`{column}` is from the {messages[-1]['role']}; it must be the assistant's answer")
    refuse_untrained(messages[-1], f"`{column}`")
    return without_weights(messages[:-1]), messages[-1]


def _longer(asked: Messages, before: Messages) -> Messages:
    """The longer of the row's prompt and the messages before its answers; the shorter must be the end of the longer.

    Raises:
        RowError: they are different prompts.
    """
    short, long = sorted((asked, before), key=len)
    if long[len(long) - len(short) :] != short:
        raise RowError("`chosen` and `rejected` answer another prompt than the row's; keep one of the two")
    return long
