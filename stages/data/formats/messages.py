"""A conversation under OpenAI's names: `messages: [{role, content, tool_calls}, …]`, and `tools`."""

from stages.data.formats._tools import with_tools
from stages.data.formats._turns import MessageNames, conversation
from stages.data.row import FileRow, Row

NEEDED = ("messages",)
OPTIONAL = ("system", "tools")


def normalise(row: FileRow, names: MessageNames) -> Row:
    return with_tools(row, {"messages": conversation(row, "messages", names)})
