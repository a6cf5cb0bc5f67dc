"""A conversation in ShareGPT's words: `conversations: [{from, value}, …]`, and `tools`."""

from stages.data.formats._tools import with_tools
from stages.data.formats._turns import Words, talk
from stages.data.row import Row

NEEDED = ("conversations",)
OPTIONAL = ("system", "tools")


def normal(row: Row, words: Words) -> Row:
    return with_tools(row, {"messages": talk(row, "conversations", words)})
