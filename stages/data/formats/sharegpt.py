"""A conversation under ShareGPT's names: `conversations: [{from, value}, …]`, and `tools`."""

from stages.data.formats._message import MessageForm
from stages.data.formats._tools import with_tools
from stages.data.formats._turns import conversation, up_to_trained
from stages.data.row import FileRow, Row

NEEDED = ("conversations",)
OPTIONAL = ("system", "history", "tools")
LIST = "conversations"


def normalise(row: FileRow, form: MessageForm) -> Row:
    return with_tools(row, {"messages": up_to_trained(conversation(row, "conversations", form), "`conversations`")})
