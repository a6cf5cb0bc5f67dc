"""Plain text: `text`."""

from stages.data.formats._turns import Words
from stages.data.formats._values import text
from stages.data.row import Row

NEEDED = ("text",)
OPTIONAL = ()


def normal(row: Row, words: Words) -> Row:
    return {"text": text(row["text"], "`text`")}
