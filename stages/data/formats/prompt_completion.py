"""A prompt and what completes it, each text or messages: `prompt`, `completion`."""

from stages.data.formats._tools import with_tools
from stages.data.formats._turns import Words, in_turn, turns, with_system
from stages.data.row import Messages, Row

NEEDED = ("prompt", "completion")
OPTIONAL = ("system", "tools")


def normal(row: Row, words: Words) -> Row:
    return with_tools(row, {"messages": whole(row, words)})


def whole(row: Row, words: Words) -> Messages:
    """Prompt and completion as one conversation."""
    prompt = in_turn(turns(row["prompt"], "prompt", words, "user"), "`prompt`", "user")
    both = prompt + turns(row["completion"], "completion", words, "assistant")
    return with_system(row, in_turn(both, "`prompt` and `completion`", "assistant"))
