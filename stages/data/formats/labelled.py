"""One answer that is good or bad, as KTO takes it: a conversation, or prompt and completion, and a `label`."""

from stages.data.formats._tools import with_tools
from stages.data.formats._turns import Words, asked, say, talk, with_system
from stages.data.formats._values import kind
from stages.data.formats.prompt_completion import whole
from stages.data.row import Messages, Row, RowError

NEEDED = ("label",)
OPTIONAL = (
    *("messages", "conversations", "prompt", "completion"),
    *("instruction", "input", "output", "history", "system", "tools"),
)
_LABELS = {"true": True, "1": True, "false": False, "0": False}


def normal(row: Row, words: Words) -> Row:
    said = _said(row, words)
    return with_tools(row, {"prompt": said[:-1], "completion": said[-1:], "label": _label(row["label"])})


def _said(row: Row, words: Words) -> Messages:
    """The conversation, from the first of the columns that can hold it."""
    there = {name for name in OPTIONAL if row.get(name) is not None}
    for name in ("messages", "conversations"):
        if name in there:
            return talk(row, name, words)
    if {"prompt", "completion"} <= there:
        return whole(row, words)
    if {"instruction", "output"} <= there:
        return with_system(row, [*asked(row), say("assistant", row["output"], "`output`")])
    ways = "`messages`, `conversations`, `prompt` and `completion`, or `instruction` and `output`"
    raise RowError(f"the row has no answer; give {ways}")


def _label(value: object) -> bool:
    """True for a good answer; a table has it as text or as 0 and 1."""
    known = _LABELS.get(str(value).strip().lower()) if isinstance(value, (bool, int, str)) else None
    if known is None:
        shown = kind(value)
        if isinstance(value, str):
            shown = f"`{value[:20]}`" if value.strip() else "empty"
        raise RowError(f"`label` is {shown}; it must be true for a good answer or false for a bad one")
    return known
