"""Single values of a row: text that is not empty and can be encoded, or a RowError that says what is there instead."""

import json
import re
from collections.abc import Iterable
from itertools import islice
from typing import Any

from stages.data.row import RowError

_SURROGATE = re.compile("[\ud800-\udfff]")
# How the types of OpenAI's content parts that are not text begin.
MEDIA = ("image", "video", "audio", "input_audio", "input_image")
MEDIA_COLUMNS = ("images", "videos", "audios")


def text(value: object, name: str) -> str:
    """The value, which must be text that is not blank; a list of one text is that text. Raises RowError."""
    words = value if isinstance(value, str) else _only(value, name)
    if not words.strip():
        raise RowError(f"{name} is empty; fill it in or remove the row")
    return encodable(words, name)


def _only(value: object, name: str) -> str:
    """The text in a list of one text. Raises RowError."""
    texts = value if isinstance(value, list) and all(isinstance(entry, str) for entry in value) else []
    if len(texts) > 1:
        raise RowError(f"{name} is a list of {len(texts)} texts; keep one, or write a row for each")
    if not texts:
        raise RowError(f"{name} is {type_in_words(value)}; it must be text")
    return str(texts[0])


def optional(value: object, name: str) -> str:
    """As `text`, but null and blank text give an empty string."""
    blank = value is None or (isinstance(value, str) and not value.strip())
    return "" if blank else text(value, name)


def encodable(value: str, name: str) -> str:
    """The text, which must not hold a lone surrogate. Raises RowError."""
    if not value.isascii() and _SURROGATE.search(value):
        raise RowError(f"{name} holds half a character (a lone surrogate); write the whole character")
    return value


def parsed(value: str, name: str, wanted: str) -> Any:
    """The JSON value of a text. Raises RowError, whose sentence starts with `name` and ends with `wanted`."""
    try:
        return json.loads(value, parse_constant=_refuse_constant)
    except json.JSONDecodeError as error:
        why = f"{error.msg.removesuffix(' at')} at character {error.pos + 1}"
    except RecursionError:
        why = "nested too deeply"
    except ValueError as error:
        why = "a number has too many digits" if "digits" in str(error) else str(error)
    verb = "is" if name.endswith(("that", "text")) else "is text that is"
    raise RowError(f"{name} {verb} not valid JSON ({why}); it must be {wanted}") from None


def _refuse_constant(name: str) -> None:
    raise ValueError(f"JSON has no {name}")


def is_blank(value: object) -> bool:
    """Whether a JSON value holds nothing: null, blank text, an empty list or an empty object."""
    if isinstance(value, str):
        return not value.strip()
    return value is None or value in ([], {})


def is_message(value: object) -> bool:
    """Whether a value is an object with the usual keys of a message."""
    return isinstance(value, dict) and any(keys <= value.keys() for keys in ({"role", "content"}, {"from", "value"}))


def type_in_words(value: object) -> str:
    """The type of a JSON value for a message, such as `null`, `a list` or `text`."""
    names = {type(None): "null", bool: "true or false", str: "text", list: "a list", dict: "an object"}
    if value == []:
        return "an empty list"
    return names.get(type(value), "a number" if isinstance(value, (int, float)) else type(value).__name__)


def listed(names: Iterable[str]) -> str:
    """At most twelve names in backticks, each at most 40 characters long and on one line."""
    return ", ".join(f"`{' '.join(name.split())[:40]}`" for name in islice(names, 12))
