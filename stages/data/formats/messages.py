"""A conversation under OpenAI's names: `messages: [{role, content, tool_calls}, …]`, and `tools`."""

from stages.data.formats._message import MessageForm
from stages.data.formats._tools import with_tools
from stages.data.formats._turns import conversation, up_to_trained
from stages.data.row import FileRow, Row

NEEDED = ("messages",)
OPTIONAL = ("system", "history", "tools")
LIST = "messages"


def normalise(row: FileRow, form: MessageForm) -> Row:
    return with_tools(row, {"messages": up_to_trained(conversation(row, "messages", form), "`messages`")})
