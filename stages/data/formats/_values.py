"""Single values of a row: text that is not empty and can be encoded, or a RowError that says what is there instead."""

import re
from collections.abc import Iterable
from itertools import islice

from stages.data.row import RowError

_SURROGATE = re.compile("[\ud800-\udfff]")
# How the types of OpenAI's content parts that are not text begin.
MEDIA = ("image", "video", "audio", "input_audio", "input_image")
MEDIA_COLUMNS = ("images", "videos", "audios")


def text(value: object, name: str) -> str:
    """The value, which must be text that is not blank. Raises RowError."""
    if not isinstance(value, str):
        raise RowError(f"{name} is {type_in_words(value)}; it must be text")
    if not value.strip():
        raise RowError(f"{name} is empty; fill it in or remove the row")
    return encodable(value, name)


def optional(value: object, name: str) -> str:
    """As `text`, but null and blank text give an empty string."""
    blank = value is None or (isinstance(value, str) and not value.strip())
    return "" if blank else text(value, name)


def encodable(value: str, name: str) -> str:
    """The text, which must not hold a lone surrogate. Raises RowError."""
    if not value.isascii() and _SURROGATE.search(value):
        raise RowError(f"{name} holds half a character (a lone surrogate); write the whole character")
    return value


def type_in_words(value: object) -> str:
    """The type of a JSON value for a message, such as `null`, `a list` or `text`."""
    names = {type(None): "null", bool: "true or false", str: "text", list: "a list", dict: "an object"}
    if value == []:
        return "an empty list"
    return names.get(type(value), "a number" if isinstance(value, (int, float)) else type(value).__name__)


def listed(names: Iterable[str]) -> str:
    """At most twelve names in backticks, each at most 40 characters long and on one line."""
    return ", ".join(f"`{' '.join(name.split())[:40]}`" for name in islice(names, 12))
