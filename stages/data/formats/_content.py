"""The content of a message as words, a thought and tool calls; it may be text or a list of parts with a `type`.

Parts are OpenAI's `{"type": "text", "text": …}` and LLaMA-Factory's `{"type": "text" | "reasoning" | "tool_call",
"value": …}`.
"""

import re
from typing import Any, NamedTuple

from stages.data.formats._tools import calls
from stages.data.formats._values import MEDIA, listed, text, type_in_words
from stages.data.row import RowError

_WORDS = ("text", "input_text", "output_text")
_THOUGHTS = ("reasoning", "thinking")
_CALLS = ("tool_call", "function_call")
_THINK = re.compile(r"\s*<think>(.*?)</think>", re.DOTALL)


class Content(NamedTuple):
    """What a message holds."""

    words: object
    """The text, or any other value that is not a list of parts."""
    thought: str = ""
    calls: tuple[dict[str, Any], ...] = ()


def split(content: object, name: str, *, is_output: bool = False) -> Content:
    """The content of a message; `is_output`: it is what a tool gave back, which may be any list of objects.

    Raises:
        RowError: a part is neither text nor a thought nor a tool call, or they are in another order.
    """
    parts = [content] if isinstance(content, dict) and "type" in content else content
    if not isinstance(parts, list) or not parts or not all(isinstance(part, dict) and "type" in part for part in parts):
        return Content(content)
    types = [str(part["type"]) for part in parts]
    if media := [kind for kind in types if kind.startswith(MEDIA)]:
        raise RowError(f"{name} holds {listed(media[:1])}; only text can be trained on")
    if is_output and not all(kind in _WORDS for kind in types):
        return Content(content)
    words, thoughts, called = list[str](), list[str](), list[dict[str, Any]]()
    for kind, part in zip(types, parts, strict=True):
        value = next((part[key] for key in ("value", "text", kind) if key in part), None)
        if kind in _WORDS and not called:
            if not isinstance(value, str):
                raise RowError(f"a part of {name} is {type_in_words(value)}; it must be text")
            words.append(value)
        elif kind in _THOUGHTS and not words and not called:
            thoughts.append(text(value, f"the thought of {name}"))
        elif kind in _CALLS:
            called += calls(part if value is None else value, name)
        elif kind in (*_WORDS, *_THOUGHTS):
            raise RowError(f"{name} has its parts in another order than thought, words, tool calls; reorder them")
        else:
            raise RowError(
                f"{name} holds a part of the type {listed([kind])}; it must be `text`, `reasoning` or `tool_call`"
            )
    return Content("".join(words), "\n".join(thoughts), tuple(called))


def split_call(content: object) -> tuple[object, str]:
    """The text of a tool call and the thought before it, which LLaMA-Factory writes between <think> and </think>."""
    found = _THINK.match(content) if isinstance(content, str) else None
    return (content, "") if found is None else (str(content)[found.end() :], found[1])


def thought_in(words: str) -> str | None:
    """The thought between <think> and </think> at the start of a text; None if there is none."""
    found = _THINK.match(words)
    return None if found is None else found[1].strip()
