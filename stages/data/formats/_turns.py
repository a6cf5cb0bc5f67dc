"""Conversations: messages in any of the usual words in, messages with `role` and `content` out, in their due order."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from stages.data.formats._tools import calls, output
from stages.data.formats._values import MEDIA, MEDIA_COLUMNS, kind, listed, optional, text
from stages.data.row import Message, Messages, Row, RowError

# What we call the parts of a conversation; `function_call` is the assistant's, as a message of its own.
ROLES = ("system", "user", "assistant", "function_call", "tool")
_USUAL = {
    **{"system": "system", "developer": "system", "user": "user", "human": "user"},
    **{"assistant": "assistant", "gpt": "assistant"},
    **{"function_call": "function_call", "tool_call": "function_call"},
    **{"tool": "tool", "observation": "tool", "function": "tool", "tool_response": "tool"},
}
_SHAPE = "it must be an object with `role` and `content`"
_TURNS = "after an optional system message user and assistant take turns"
# After whom who may speak, the usual one first, and the rule; a `call` is an assistant's turn with tool calls.
_DUE = {
    "": (("user",), _TURNS),
    "user": (("assistant",), _TURNS),
    "assistant": (("user", "tool"), _TURNS),
    "call": (("tool",), "a tool call is followed by what the tool gave back"),
    "tool": (("assistant", "tool"), "what a tool gave back is followed by the assistant"),
}


@dataclass(frozen=True)
class Words:
    """What a file calls things inside its messages, where it has words of its own."""

    roles: Mapping[str, str] = field(default_factory=dict)
    """The file's role → ours."""
    keys: Mapping[str, str] = field(default_factory=dict)
    """`role` and `content` → the file's keys."""


def turns(value: object, name: str, words: Words, role: str = "") -> Messages:
    """A list of messages, or one; or plain text, where `role` says whose."""
    if role and not isinstance(value, (list, dict)):
        return [say(role, value, f"`{name}`")]
    items = [value] if isinstance(value, dict) else value
    if not isinstance(items, list) or not items:
        raise RowError(f"`{name}` is {kind(value)}; it must be a list of messages")
    return [_message(item, f"message {number} of `{name}`", words) for number, item in enumerate(items, 1)]


def _message(item: object, at: str, words: Words) -> Message:
    if not isinstance(item, dict):
        raise RowError(f"{at} is {kind(item)}; {_SHAPE}")
    usual = ("from", "value") if "from" in item else ("role", "content")
    who, what = words.keys.get("role", usual[0]), words.keys.get("content", usual[1])
    named = item.get(who)
    if not isinstance(named, str):
        raise RowError(f"{at} has no `{who}`; {_SHAPE} (map other names with `message_keys:`)")
    role = words.roles.get(named) or _USUAL.get(named)
    if role is None:
        mapped = "map other names with `roles:`"
        raise RowError(
            f"{at} has the role {listed([named])}; it must be `system`, `user`, `assistant` or `tool` ({mapped})"
        )
    content = _joined(item.get(what), at)
    if role == "function_call":
        return {"role": "assistant", "content": "", "tool_calls": calls(content, at)}
    if role == "tool":
        return {"role": "tool", "content": output(content, at)}
    if called := item.get("tool_calls") or item.get("function_call"):
        if role != "assistant":
            raise RowError(f"{at} is a tool call from the {role}; only the assistant calls tools")
        return {"role": role, "content": optional(content, at), "tool_calls": calls(called, at)}
    return {"role": role, "content": optional(content, at) if role == "system" else text(content, at)}


def _joined(content: object, at: str) -> object:
    """The text of OpenAI's content parts; anything else as it is."""
    if not isinstance(content, list) or not all(isinstance(part, dict) and "type" in part for part in content):
        return content
    for part in content:
        if str(part["type"]).startswith(MEDIA):
            raise RowError(f"{at} holds {listed([str(part['type'])])}; only text can be trained on")
    if content and all(part["type"] == "text" and isinstance(part.get("text"), str) for part in content):
        return "".join(part["text"] for part in content)
    return content


def in_turn(said: Messages, name: str, last: str) -> Messages:
    """The same turns, less an empty system message; RowError unless they are in their due order up to `last`."""
    start = 1 if said[0]["role"] == "system" else 0
    before = ""
    for number, turn in enumerate(said[start:], start + 1):
        due, rule = _DUE[before]
        if turn["role"] not in due:
            raise RowError(f"message {number} of {name} is from the {turn['role']}, not the {due[0]}; {rule}")
        before = "call" if turn.get("tool_calls") else turn["role"]
    if said[-1]["role"] not in ((last, "tool") if last == "user" else (last,)):
        raise RowError(f"{name} must end with a message from the {last}, not from the {said[-1]['role']}")
    return said if said[0]["role"] != "system" or said[0]["content"] else said[1:]


def with_system(row: Row, said: Messages) -> Messages:
    """The turns after the row's own system prompt, if it has one."""
    system = optional(row.get("system"), "`system`")
    if system and said[0]["role"] == "system":
        raise RowError("`system` and the first message are both system prompts; keep one")
    return [{"role": "system", "content": system}, *said] if system else said


def say(role: str, value: object, name: str) -> Message:
    """A message of plain text."""
    words = text(value, name)
    # A blank before an answer merges with the prompt's last token, which no server would then write.
    return {"role": role, "content": words.strip() if role == "assistant" else words}


def asked(row: Row) -> Messages:
    """The turns of an alpaca row up to what is asked."""
    said: Messages = []
    history = row.get("history") or []
    for number, pair in enumerate(history if isinstance(history, list) else [history], 1):
        if not isinstance(pair, list) or len(pair) != 2:
            raise RowError("`history` must be a list of question and answer pairs")
        at = f"pair {number} of `history`"
        said += [say("user", pair[0], at), say("assistant", pair[1], at)]
    ask = say("user", row["instruction"], "`instruction`")
    if more := optional(row.get("input"), "`input`"):
        ask["content"] += "\n" + more
    return [*said, ask]


def prompt(row: Row, words: Words) -> Messages:
    """What a row asks in `prompt`, `instruction` or `conversations`; empty when it has none of them."""
    if row.get("prompt") is not None:
        name, said = "prompt", turns(row["prompt"], "prompt", words, "user")
    elif row.get("instruction") is not None:
        name, said = "instruction", asked(row)
    elif row.get("conversations") is not None:
        name, said = "conversations", turns(row["conversations"], "conversations", words)
    else:
        return []
    return with_system(row, in_turn(said, f"`{name}`", "user"))


def talk(row: Row, name: str, words: Words) -> Messages:
    """The whole conversation that a column holds, up to the assistant's last answer."""
    for media in MEDIA_COLUMNS:
        if row.get(media):
            raise RowError(f"the row has `{media}`; only text can be trained on")
    return with_system(row, in_turn(turns(row[name], name, words), f"`{name}`", "assistant"))
