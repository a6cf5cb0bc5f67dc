"""Plain text: `text`."""

from stages.data.formats._turns import MessageNames
from stages.data.formats._values import text
from stages.data.row import FileRow, Row

NEEDED = ("text",)
OPTIONAL = ()


def normalise(row: FileRow, names: MessageNames) -> Row:
    return {"text": text(row["text"], "`text`")}
