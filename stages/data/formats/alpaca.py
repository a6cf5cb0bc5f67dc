"""A question and its answer: `instruction`, `input` and `output`; earlier turns in `history`."""

from stages.data.formats._tools import with_tools
from stages.data.formats._turns import Words, asked, say, with_system
from stages.data.row import Row

NEEDED = ("instruction", "output")
OPTIONAL = ("input", "system", "history", "tools")


def normal(row: Row, words: Words) -> Row:
    said = [*asked(row), say("assistant", row["output"], "`output`")]
    return with_tools(row, {"messages": with_system(row, said)})
