"""One message of a file in; its role, words, thought, tool calls and weight out."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from stages.data.formats._content import Content, split, split_call, thought_in
from stages.data.formats._tools import calls, output
from stages.data.formats._values import MEDIA_COLUMNS, is_blank, listed, optional, text, type_in_words
from stages.data.row import FileRow, Message, RowError

# Our roles. A `function_call` message is the assistant's and holds nothing but tool calls.
ROLES = ("system", "user", "assistant", "function_call", "tool")
# Usual names of roles → ours.
_USUAL = {
    **{"system": "system", "developer": "system", "user": "user", "human": "user"},
    **{"assistant": "assistant", "gpt": "assistant"},
    **{"function_call": "function_call", "tool_call": "function_call"},
    **{"tool": "tool", "observation": "tool", "function": "tool", "tool_response": "tool"},
}
# Our keys of a message besides `role` and `content` → the usual names of them.
_EXTRA = {
    "reasoning_content": ("reasoning_content", "reasoning", "thinking"),
    "tool_calls": ("tool_calls", "function_call"),
    "tool_call_id": ("tool_call_id",),
    "weight": ("weight", "loss_weight", "train"),
}
KEYS = ("role", "content", *_EXTRA)
"""The keys of a message that a file may call otherwise."""
_MEDIA_KEYS = (*MEDIA_COLUMNS, "image", "video", "audio")
_SHAPE = "it must be an object with `role` and `content`"
_WEIGHTS = {"true": 1, "1": 1, "1.0": 1, "false": 0, "0": 0, "0.0": 0}


@dataclass(frozen=True)
class MessageForm:
    """How a file writes messages, where that is not the usual way, and which keys of them nothing has read."""

    roles: Mapping[str, str] = field(default_factory=dict)
    """The file's role → ours."""
    keys: Mapping[str, str] = field(default_factory=dict)
    """Our key of a message → the file's."""
    merge: bool = False
    """Join messages of one role that follow each other, and keep an assistant's first message out of the loss."""
    unread: dict[str, None] = field(default_factory=dict, compare=False)
    """The file's keys of messages that nothing reads, in their order; filled in while messages are read."""


def read_message(item: object, name: str, form: MessageForm) -> Message:
    """A message as an object with `role` and `content`, or with `from` and `value`. Raises RowError."""
    if not isinstance(item, dict):
        raise RowError(f"{name} is {type_in_words(item)}; {_SHAPE}")
    role_key, content_key = ("from", "value") if "from" in item else ("role", "content")
    if form.keys:
        role_key, content_key = form.keys.get("role", role_key), form.keys.get("content", content_key)
    role, content = _role(item.get(role_key), role_key, name, form), item.get(content_key)
    if len(item) == 2 and isinstance(content, str) and (role == "user" or role == "assistant"):  # most messages
        return {"role": role, "content": said(role, content, name)}
    more = {key: value for key, value in item.items() if key not in (role_key, content_key) and not is_blank(value)}
    if role == "function_call":
        content, thought = split_call(content)
        held = Content("", thought, tuple(calls(content, name)))
    else:
        held = split(content, name, is_output=role == "tool")
    return _message("assistant" if role == "function_call" else role, held, _Extra(more, name, form))


def _role(theirs: object, key: str, name: str, form: MessageForm) -> str:
    if not isinstance(theirs, str):
        raise RowError(f"{name} has no `{key}`; {_SHAPE} (map other names with `message_keys:`)")
    role = form.roles.get(theirs) or _USUAL.get(theirs)
    if role is None:
        mapped = "map other names with `roles:`"
        raise RowError(
            f"{name} has the role {listed([theirs])}; it must be `system`, `user`, `assistant` or `tool` ({mapped})"
        )
    return role


class _Extra:
    """The keys of a message besides its role and its content, without those that hold nothing."""

    def __init__(self, more: FileRow, name: str, form: MessageForm) -> None:
        self.more, self.name, self.form = more, name, form

    def filled(self, ours: str) -> dict[str, Any]:
        """The file's keys for one of our keys, and their values."""
        if not self.more:
            return {}
        names = (self.form.keys.get(ours), *_EXTRA[ours])
        return {name: self.more[name] for name in dict.fromkeys(names) if name in self.more}

    def refuse_rest(self) -> None:
        """Remember the keys that nothing reads. Raises RowError for those without which a message is another."""
        rest = self.more.keys() - {name for ours in _EXTRA for name in self.filled(ours)}
        if media := [name for name in _MEDIA_KEYS if name in rest]:
            raise RowError(f"{self.name} has `{media[0]}`; only text can be trained on")
        if "train_detail" in rest:
            whole = "a message is trained on as a whole, or kept out of the loss with `train`: false"
            raise RowError(f"{self.name} has `train_detail`; {whole}")
        self.form.unread.update(dict.fromkeys(key for key in self.more if key in rest))


def _message(role: str, held: Content, extra: _Extra) -> Message:
    name = extra.name
    called = [*held.calls]
    for key, value in extra.filled("tool_calls").items():
        if called:
            raise RowError(f"{name} calls tools twice, the second time in `{key}`; keep one")
        called += calls(value, name)
    if called and role != "assistant":
        raise RowError(f"{name} is a tool call from the {role}; only the assistant calls tools")
    if role == "tool":
        words = output(held.words, name)
    else:
        words = said(role, held.words, name, may_be_empty=bool(called) or role == "system")
    message: Message = {"role": role, "content": words}
    if thought := _thought(message, held.thought, extra):
        message["reasoning_content"] = thought
    if called:
        message["tool_calls"] = called
    for answers in extra.filled("tool_call_id").values():
        message |= {"tool_call_id": answers} if role == "tool" and isinstance(answers, str) else {}
    if extra.more:
        message |= _weight(role, extra)
        extra.refuse_rest()
    return message


def said(role: str, value: object, name: str, *, may_be_empty: bool = False) -> str:
    """The words of a message, those of the assistant without blanks around them. Raises RowError."""
    words = optional(value, name) if may_be_empty else text(value, name)
    # A blank before an answer merges with the prompt's last token into a token that no server would generate.
    return words.strip() if role == "assistant" else words


def _thought(message: Message, first: str, extra: _Extra) -> str:
    """The thought of a message, without blanks around it; empty if it has none, or has it in its content."""
    named = {"its content": first} if first else {}
    for key, value in extra.filled("reasoning_content").items():
        named[f"`{key}`"] = text(value, f"`{key}` of {extra.name}")
    found = {key: value.strip() for key, value in named.items()}
    if not found:
        return ""
    if message["role"] != "assistant":
        raise RowError(f"{extra.name} has a thought and is from the {message['role']}; only the assistant thinks")
    inside = thought_in(message["content"])
    different = set(found.values()) | ({inside} if inside is not None else set())
    if len(different) > 1:
        places = [*found, *(["its <think>"] if inside is not None else [])]
        raise RowError(f"{extra.name} has two thoughts, in {' and in '.join(places[:2])}; keep one")
    return "" if inside is not None else different.pop()


def _weight(role: str, extra: _Extra) -> dict[str, int]:
    """`weight` 0 for a message of the assistant that is not trained on; nothing for any other."""
    weights: dict[int, str] = {}
    for key, value in extra.filled("weight").items():
        weight = _WEIGHTS.get(str(value).strip().lower()) if isinstance(value, (bool, int, float, str)) else None
        if weight is None:
            shown = str(value)[:20] if isinstance(value, (int, float, str)) else type_in_words(value)
            must = "it must be 1 or true for a message to train on, 0 or false for another"
            raise RowError(f"{extra.name} has `{key}` {shown}; {must}")
        if weight and role != "assistant":
            only = "only the assistant's messages are trained on"
            raise RowError(f"{extra.name} is from the {role} and has `{key}` {value}; {only}")
        weights[weight] = key
    if len(weights) > 1:
        raise RowError(f"{extra.name} has `{weights[1]}` for training on it and `{weights[0]}` against it; keep one")
    return {"weight": 0} if 0 in weights and role == "assistant" else {}
