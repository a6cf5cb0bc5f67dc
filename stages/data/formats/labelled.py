"""One answer that is good or bad, as KTO takes it: a conversation, or prompt and completion, and a `label`."""

from stages.data.formats._message import MessageForm
from stages.data.formats._tools import with_tools
from stages.data.formats._turns import answered, completed, conversation, refuse_untrained, without_weights
from stages.data.formats._values import type_in_words
from stages.data.row import FileRow, Messages, Row, RowError

NEEDED = ("label",)
OPTIONAL = (
    *("messages", "conversations", "prompt", "completion"),
    *("instruction", "input", "output", "reasoning_content", "system", "history", "tools"),
)
_LABELS = {"true": True, "1": True, "false": False, "0": False}


def normalise(row: FileRow, form: MessageForm) -> Row:
    *before, answer = _messages(row, form)
    refuse_untrained(answer, "the row")
    return with_tools(row, {"prompt": without_weights(before), "completion": [answer], "label": _label(row["label"])})


def _messages(row: FileRow, form: MessageForm) -> Messages:
    """The conversation, from the first of the columns that can hold it. Raises RowError when no column does."""
    filled = {name for name in OPTIONAL if row.get(name) is not None}
    for name in ("messages", "conversations"):
        if name in filled:
            return conversation(row, name, form)
    if {"prompt", "completion"} <= filled:
        return completed(row, form)
    if {"instruction", "output"} <= filled:
        return answered(row, form)
    ways = "`messages`, `conversations`, `prompt` and `completion`, or `instruction` and `output`"
    raise RowError(f"the row has no answer; give {ways}")


def _label(value: object) -> bool:
    """True for a good answer. Tables have labels as text or as 0 and 1."""
    label = _LABELS.get(str(value).strip().lower()) if isinstance(value, (bool, int, str)) else None
    if label is None:
        shown = type_in_words(value)
        if isinstance(value, str):
            shown = f"`{value[:20]}`" if value.strip() else "empty"
        raise RowError(f"`label` is {shown}; it must be true for a good answer or false for a bad one")
    return label
