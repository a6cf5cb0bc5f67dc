"""Plain text: `text`, which may be one message of the assistant."""

from stages.data.formats._message import MessageForm, read_message
from stages.data.formats._values import is_message, text
from stages.data.row import FileRow, Row, RowError

NEEDED = ("text",)
OPTIONAL = ()


def normalise(row: FileRow, form: MessageForm) -> Row:
    value = row["text"]
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], dict):
        message = read_message(value[0], "the message in `text`", form)
        if message.keys() != {"role", "content"} or message["role"] != "assistant":
            raise RowError("the message in `text` must be the assistant's and hold only words")
        value = message["content"]
    elif isinstance(value, list) and value and all(map(is_message, value)):
        raise RowError("`text` is a list of messages, which `format: messages` reads")
    return {"text": text(value, "`text`")}
