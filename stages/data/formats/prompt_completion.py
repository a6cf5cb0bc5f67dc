"""A prompt and its completion, each text or messages: `prompt`, `completion`."""

from stages.data.formats._tools import with_tools
from stages.data.formats._turns import MessageNames, as_messages, in_order, with_system
from stages.data.row import FileRow, Messages, Row

NEEDED = ("prompt", "completion")
OPTIONAL = ("system", "tools")


def normalise(row: FileRow, names: MessageNames) -> Row:
    return with_tools(row, {"messages": joined(row, names)})


def joined(row: FileRow, names: MessageNames) -> Messages:
    """Prompt and completion as one conversation. Raises RowError."""
    prompt = in_order(as_messages(row["prompt"], "prompt", names, "user"), "`prompt`", "user")
    both = prompt + as_messages(row["completion"], "completion", names, "assistant")
    return with_system(row, in_order(both, "`prompt` and `completion`", "assistant"))
