"""A question and its answer: `instruction`, `input` and `output`; earlier turns in `history`."""

from stages.data.formats._message import MessageForm
from stages.data.formats._tools import with_tools
from stages.data.formats._turns import answered, up_to_trained
from stages.data.row import FileRow, Row

NEEDED = ("instruction", "output")
OPTIONAL = ("input", "reasoning_content", "system", "history", "tools")


def normalise(row: FileRow, form: MessageForm) -> Row:
    return with_tools(row, {"messages": up_to_trained(answered(row, form), "`output`")})
