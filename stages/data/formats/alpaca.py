"""A question and its answer: `instruction`, `input` and `output`; earlier turns in `history`."""

from stages.data.formats._tools import with_tools
from stages.data.formats._turns import MessageNames, alpaca_prompt, plain_message, with_system
from stages.data.row import FileRow, Row

NEEDED = ("instruction", "output")
OPTIONAL = ("input", "system", "history", "tools")


def normalise(row: FileRow, names: MessageNames) -> Row:
    messages = [*alpaca_prompt(row), plain_message("assistant", row["output"], "`output`")]
    return with_tools(row, {"messages": with_system(row, messages)})
