"""A prompt and its completion, each text or messages: `prompt`, `completion`."""

from stages.data.formats._message import MessageForm
from stages.data.formats._tools import with_tools
from stages.data.formats._turns import completed, up_to_trained
from stages.data.row import FileRow, Row

NEEDED = ("prompt", "completion")
OPTIONAL = ("reasoning_content", "system", "history", "tools")


def normalise(row: FileRow, form: MessageForm) -> Row:
    return with_tools(row, {"messages": up_to_trained(completed(row, form), "`completion`")})
