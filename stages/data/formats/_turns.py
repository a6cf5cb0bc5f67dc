"""Conversations: messages under any of the usual names in, messages with `role` and `content` in a valid order out."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from stages.data.formats._tools import calls, output
from stages.data.formats._values import MEDIA, MEDIA_COLUMNS, listed, optional, text, type_in_words
from stages.data.row import FileRow, Message, Messages, RowError

# Our roles. A `function_call` message is the assistant's and holds nothing but tool calls.
ROLES = ("system", "user", "assistant", "function_call", "tool")
# Usual names of roles → ours.
_USUAL = {
    **{"system": "system", "developer": "system", "user": "user", "human": "user"},
    **{"assistant": "assistant", "gpt": "assistant"},
    **{"function_call": "function_call", "tool_call": "function_call"},
    **{"tool": "tool", "observation": "tool", "function": "tool", "tool_response": "tool"},
}
_SHAPE = "it must be an object with `role` and `content`"
_TURNS = "after an optional system message user and assistant take turns"
# The role of a message → the roles that may follow it, the usual one first, and the rule in words. `call` is an
# assistant's message with tool calls; the empty role stands before the first message.
_FOLLOWING = {
    "": (("user",), _TURNS),
    "user": (("assistant",), _TURNS),
    "assistant": (("user", "tool"), _TURNS),
    "call": (("tool",), "a tool call is followed by the tool's output"),
    "tool": (("assistant", "tool"), "a tool's output is followed by the assistant"),
}


@dataclass(frozen=True)
class MessageNames:
    """The names that a file has for the parts of a message, where they are not the usual ones."""

    roles: Mapping[str, str] = field(default_factory=dict)
    """The file's role → ours."""
    keys: Mapping[str, str] = field(default_factory=dict)
    """`role` and `content` → the file's keys."""


def as_messages(value: object, name: str, names: MessageNames, role: str = "") -> Messages:
    """The messages in a value: a list of messages, or one message, or plain text of the given role.

    `name` is the value's name for messages to people. Raises RowError.
    """
    if role and not isinstance(value, (list, dict)):
        return [plain_message(role, value, f"`{name}`")]
    items = [value] if isinstance(value, dict) else value
    if not isinstance(items, list) or not items:
        raise RowError(f"`{name}` is {type_in_words(value)}; it must be a list of messages")
    return [_message(item, f"message {number} of `{name}`", names) for number, item in enumerate(items, 1)]


def _message(item: object, name: str, names: MessageNames) -> Message:
    if not isinstance(item, dict):
        raise RowError(f"{name} is {type_in_words(item)}; {_SHAPE}")
    usual = ("from", "value") if "from" in item else ("role", "content")
    role_key, content_key = names.keys.get("role", usual[0]), names.keys.get("content", usual[1])
    theirs = item.get(role_key)
    if not isinstance(theirs, str):
        raise RowError(f"{name} has no `{role_key}`; {_SHAPE} (map other names with `message_keys:`)")
    role = names.roles.get(theirs) or _USUAL.get(theirs)
    if role is None:
        mapped = "map other names with `roles:`"
        raise RowError(
            f"{name} has the role {listed([theirs])}; it must be `system`, `user`, `assistant` or `tool` ({mapped})"
        )
    content = _joined(item.get(content_key), name)
    if role == "function_call":
        return {"role": "assistant", "content": "", "tool_calls": calls(content, name)}
    if role == "tool":
        return {"role": "tool", "content": output(content, name)}
    if called := item.get("tool_calls") or item.get("function_call"):
        if role != "assistant":
            raise RowError(f"{name} is a tool call from the {role}; only the assistant calls tools")
        return {"role": role, "content": optional(content, name), "tool_calls": calls(called, name)}
    return {"role": role, "content": optional(content, name) if role == "system" else text(content, name)}


def _joined(content: object, name: str) -> object:
    """The text of OpenAI's content parts; any other content unchanged."""
    if not isinstance(content, list) or not all(isinstance(part, dict) and "type" in part for part in content):
        return content
    for part in content:
        if str(part["type"]).startswith(MEDIA):
            raise RowError(f"{name} holds {listed([str(part['type'])])}; only text can be trained on")
    if content and all(part["type"] == "text" and isinstance(part.get("text"), str) for part in content):
        return "".join(part["text"] for part in content)
    return content


def in_order(messages: Messages, name: str, last: str) -> Messages:
    """The messages without an empty system message.

    Raises:
        RowError: their roles are not in a valid order, or the last role is not `last` (or a tool's output, where
            `last` is the user).
    """
    start = 1 if messages[0]["role"] == "system" else 0
    before = ""
    for number, message in enumerate(messages[start:], start + 1):
        following, rule = _FOLLOWING[before]
        if message["role"] not in following:
            raise RowError(f"message {number} of {name} is from the {message['role']}, not the {following[0]}; {rule}")
        before = "call" if message.get("tool_calls") else message["role"]
    if messages[-1]["role"] not in ((last, "tool") if last == "user" else (last,)):
        raise RowError(f"{name} must end with a message from the {last}, not from the {messages[-1]['role']}")
    return messages if messages[0]["role"] != "system" or messages[0]["content"] else messages[1:]


def with_system(row: FileRow, messages: Messages) -> Messages:
    """The messages after the row's own system prompt, if it has one. Raises RowError for two system prompts."""
    system = optional(row.get("system"), "`system`")
    if system and messages[0]["role"] == "system":
        raise RowError("`system` and the first message are both system prompts; keep one")
    return [{"role": "system", "content": system}, *messages] if system else messages


def plain_message(role: str, value: object, name: str) -> Message:
    """A message of plain text. Raises RowError when the value is not text or is blank."""
    content = text(value, name)
    # A blank before an answer merges with the prompt's last token into a token that no server would generate.
    return {"role": role, "content": content.strip() if role == "assistant" else content}


def alpaca_prompt(row: FileRow) -> Messages:
    """The messages of an alpaca row before its answer: `history`, then `instruction` with `input` below it."""
    messages: Messages = []
    history = row.get("history") or []
    for number, pair in enumerate(history if isinstance(history, list) else [history], 1):
        if not isinstance(pair, list) or len(pair) != 2:
            raise RowError("`history` must be a list of question and answer pairs")
        name = f"pair {number} of `history`"
        messages += [plain_message("user", pair[0], name), plain_message("assistant", pair[1], name)]
    question = plain_message("user", row["instruction"], "`instruction`")
    if more := optional(row.get("input"), "`input`"):
        question["content"] += "\n" + more
    return [*messages, question]


def prompt(row: FileRow, names: MessageNames) -> Messages:
    """The prompt in `prompt`, `instruction` or `conversations`; empty when the row has none of these columns."""
    if row.get("prompt") is not None:
        column, messages = "prompt", as_messages(row["prompt"], "prompt", names, "user")
    elif row.get("instruction") is not None:
        column, messages = "instruction", alpaca_prompt(row)
    elif row.get("conversations") is not None:
        column, messages = "conversations", as_messages(row["conversations"], "conversations", names)
    else:
        return []
    return with_system(row, in_order(messages, f"`{column}`", "user"))


def conversation(row: FileRow, column: str, names: MessageNames) -> Messages:
    """The whole conversation in a column, which must end with the assistant's answer. Raises RowError."""
    for media in MEDIA_COLUMNS:
        if row.get(media):
            raise RowError(f"the row has `{media}`; only text can be trained on")
    return with_system(row, in_order(as_messages(row[column], column, names), f"`{column}`", "assistant"))
