"""A conversation under ShareGPT's names: `conversations: [{from, value}, …]`, and `tools`."""

from stages.data.formats._tools import with_tools
from stages.data.formats._turns import MessageNames, conversation
from stages.data.row import FileRow, Row

NEEDED = ("conversations",)
OPTIONAL = ("system", "tools")


def normalise(row: FileRow, names: MessageNames) -> Row:
    return with_tools(row, {"messages": conversation(row, "conversations", names)})
