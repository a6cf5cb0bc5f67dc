"""A conversation in OpenAI's words: `messages: [{role, content, tool_calls}, …]`, and `tools`."""

from stages.data.formats._tools import with_tools
from stages.data.formats._turns import Words, talk
from stages.data.row import Row

NEEDED = ("messages",)
OPTIONAL = ("system", "tools")


def normal(row: Row, words: Words) -> Row:
    return with_tools(row, {"messages": talk(row, "messages", words)})
