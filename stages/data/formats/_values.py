"""Single values of a row: text that is there and whole, or a sentence about what is there instead."""

import re
from collections.abc import Iterable
from itertools import islice

from stages.data.row import RowError

_HALF = re.compile("[\ud800-\udfff]")
MEDIA = ("image", "video", "audio", "input_audio", "input_image")  # how OpenAI's parts that are no text begin
MEDIA_COLUMNS = ("images", "videos", "audios")


def text(value: object, name: str) -> str:
    """The value itself, when it is text with words in it."""
    if not isinstance(value, str):
        raise RowError(f"{name} is {kind(value)}; it must be text")
    if not value.strip():
        raise RowError(f"{name} is empty; fill it in or leave the row out")
    return whole(value, name)


def optional(value: object, name: str) -> str:
    """As `text`, and nothing for null and blanks."""
    blank = value is None or (isinstance(value, str) and not value.strip())
    return "" if blank else text(value, name)


def whole(value: str, name: str) -> str:
    """The text, when it can be encoded."""
    if not value.isascii() and _HALF.search(value):
        raise RowError(f"{name} holds half a character (a lone surrogate); write the whole character")
    return value


def kind(value: object) -> str:
    """What a value is, in words."""
    kinds = {type(None): "null", bool: "true or false", str: "text", list: "a list", dict: "an object"}
    if value == []:
        return "an empty list"
    return kinds.get(type(value), "a number" if isinstance(value, (int, float)) else type(value).__name__)


def listed(names: Iterable[str]) -> str:
    """At most twelve names, short and on one line."""
    return ", ".join(f"`{' '.join(name.split())[:40]}`" for name in islice(names, 12))
