"""Conversations: messages under any of the usual names in, messages with `role` and `content` in a valid order out."""

from collections.abc import Sequence

from stages.data.formats._content import thought_in
from stages.data.formats._message import MessageForm, read_message, said
from stages.data.formats._tools import in_order_of_calls
from stages.data.formats._values import MEDIA_COLUMNS, is_blank, is_message, optional, parsed, text, type_in_words
from stages.data.row import FileRow, Message, Messages, RowError, is_trained

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
# The names of the two speakers as data sets write them before what is said, such as `问：…` and `答：…`.
_SPEAKERS = (("问", "答"), ("用户", "助手"), ("Q", "A"), ("Human", "Assistant"), ("User", "Assistant"))


# Messages


def as_messages(value: object, name: str, form: MessageForm, role: str = "") -> Messages:
    """The messages in a value: a list of messages, one message, the JSON text of either, or texts that take turns.

    With `role`, plain text is a message of that role. `name` is the value's name for messages to people.

    Raises:
        RowError: the value holds no messages, or one of them is wrong.
    """
    value = _from_json(value, name, is_text=bool(role)) if isinstance(value, str) else value
    items = [value] if isinstance(value, dict) else value
    texts = isinstance(items, list) and isinstance(next(iter(items), None), str) and all(map(_is_text, items))
    if role and (texts or not isinstance(items, list)):
        return [plain_message(role, value, f"`{name}`")]
    if not isinstance(items, list) or not items:
        raise RowError(f"`{name}` is {type_in_words(value)}; it must be a list of messages")
    if texts:
        items = _alternating(items)
    messages = [read_message(item, f"message {number} of `{name}`", form) for number, item in enumerate(items, 1)]
    return in_order_of_calls(messages, name)


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _from_json(value: str, name: str, *, is_text: bool) -> object:
    """What a text holds as JSON, as tables have it; with `is_text` only messages, so that any other text is text."""
    if not value.lstrip().startswith(("[", "{")):
        return value
    if not is_text:
        return parsed(value, f"`{name}`", "a list of messages as JSON text, as `json.dumps` writes it")
    try:
        found = parsed(value, f"`{name}`", "a list of messages")
    except RowError:
        return value
    items = found if isinstance(found, list) else [found]
    return found if items and all(map(is_message, items)) else value


def _alternating(texts: Sequence[str]) -> Messages:
    """Texts of a user and an assistant as messages: by the speakers' names if every text has one, or in turns."""
    for user, assistant in _SPEAKERS:
        parts = [text.lstrip().replace("：", ":", 1).partition(":") for text in texts]
        if all(sign and speaker in (user, assistant) for speaker, sign, _ in parts):
            return [
                {"role": "user" if speaker == user else "assistant", "content": words.strip()}
                for speaker, _, words in parts
            ]
    roles = ("user", "assistant")
    return [{"role": roles[number % 2], "content": text} for number, text in enumerate(texts)]


def plain_message(role: str, value: object, name: str) -> Message:
    """A message of plain text. Raises RowError when the value is not text or is blank."""
    return {"role": role, "content": said(role, value, name)}


def with_thought(row: FileRow, answer: Message, column: str) -> Message:
    """The answer in a column with the thought in the row's `reasoning_content`, if it has one. Raises RowError."""
    if "reasoning_content" not in row or is_blank(row["reasoning_content"]):
        return answer
    if "reasoning_content" in answer or thought_in(answer["content"]) is not None:
        raise RowError(f"the row has two thoughts, in `{column}` and in `reasoning_content`; keep one")
    return {**answer, "reasoning_content": text(row["reasoning_content"], "`reasoning_content`").strip()}


# Their order


def in_order(messages: Messages, name: str, last: str, form: MessageForm) -> Messages:
    """The messages without an empty system message; a tool call joins the assistant's message before it.

    Raises:
        RowError: their roles are not in a valid order, or the last role is not `last` (or a tool's output, where
            `last` is the user).
    """
    turns: Messages = []
    before, is_asked = "", False
    for number, message in enumerate(messages, 1):
        role = message["role"]
        if form.merge and role == "assistant" and not is_asked:
            message = {**message, "weight": 0}
        following, rule = _FOLLOWING[before]
        if is_asked and role == following[0]:  # most messages
            turns.append(message)
            before = "call" if "tool_calls" in message else role
            continue
        follows = bool(turns) and role == turns[-1]["role"] != "tool"  # a message of the same role
        apart = _apart(turns[-1], message) if follows else None
        if follows and apart is None and (form.merge or not message["content"]):
            turns[-1] = _joined(turns[-1], message)
        elif number == 1 and role == "system":
            turns.append(message)
            continue
        else:
            is_first = form.merge and not before and role == "assistant"
            if role not in following and not is_first:
                alone = name if len(messages) == 1 and last == "assistant" else ""
                hint = _joining(apart) if follows else _leading(alone) if not before and role == "assistant" else ""
                raise RowError(f"message {number} of {name} is from the {role}, not the {following[0]}; {rule}{hint}")
            is_asked = is_asked or role == "user"
            turns.append(message)
        before = "" if role == "system" else "call" if "tool_calls" in turns[-1] else role
    if turns[-1]["role"] not in ((last, "tool") if last == "user" else (last,)):
        add = "; add the answer, or remove the row" if last == "assistant" else ""
        raise RowError(f"{name} must end with a message from the {last}, not from the {turns[-1]['role']}{add}")
    return turns if turns[0]["role"] != "system" or turns[0]["content"] else turns[1:]


def _apart(before: Message, message: Message) -> str | None:
    """Why a message cannot be one turn with the message before it, of the same role; None if it can."""
    if "reasoning_content" in message:
        return "it has a thought of its own"
    if before.get("weight") != message.get("weight"):
        return "one of them is trained on and the other is not"
    return "words cannot follow a tool call" if "tool_calls" in before and message["content"] else None


def _joined(before: Message, message: Message) -> Message:
    called = [*before.get("tool_calls", []), *message.get("tool_calls", [])]
    words = "\n".join(filter(None, (before["content"], message["content"])))
    return {**before, "content": words, **({"tool_calls": called} if called else {})}


def _joining(apart: str | None) -> str:
    """The clause about a message of the same role as the one before it; `apart` is why they cannot be joined."""
    joined = "`turns: merge` joins messages of one role"
    return f"; {joined}" if apart is None else f"; it cannot be joined to the message before it: {apart}"


def _leading(alone: str) -> str:
    """The clause about an answer before the first question; `alone` is its column if that holds nothing else."""
    if alone:
        return f"; for text without a question use `format: text` with `columns: {{text: {alone.strip('`')}}}`"
    return "; with `turns: merge` it stays in the prompt, outside the loss"


def up_to_trained(messages: Messages, name: str) -> Messages:
    """The messages up to the last one that is trained on, as nothing after it is in the loss.

    Raises:
        RowError: no message is trained on.
    """
    end = len(messages)
    while end and not is_trained(messages[end - 1]):
        end -= 1
    if not end:
        raise RowError(f"every answer in {name} has the weight 0, so the row teaches nothing; remove the row")
    return messages[:end]


def refuse_untrained(answer: Message, name: str) -> None:
    """
    Raises:
        RowError: the answer that a row is about has the weight 0.
    """
    if not is_trained(answer):
        raise RowError(f"the answer in {name} has the weight 0, so the row teaches nothing; remove the row")


def without_weights(messages: Messages) -> Messages:
    """The messages of a prompt, none of which is trained on."""
    return [
        {key: value for key, value in message.items() if key != "weight"} if "weight" in message else message
        for message in messages
    ]


# Conversations


def with_context(row: FileRow, messages: Messages, form: MessageForm) -> Messages:
    """The messages after the row's own system prompt and `history`.

    Raises:
        RowError: there are two system prompts, `history` is wrong, or the row has images, videos or audio.
    """
    for media in MEDIA_COLUMNS:
        if row.get(media):
            raise RowError(f"the row has `{media}`; only text can be trained on")
    system = optional(row["system"], "`system`") if "system" in row else ""
    history = _history(row["history"], form) if "history" in row else []
    if not system and not history:
        return messages
    parts = {
        "`system`": [{"role": "system", "content": system}] if system else [],
        "`history`": history,
        "the first message": messages,
    }
    if len(prompts := [name for name, part in parts.items() if part and part[0]["role"] == "system"]) > 1:
        raise RowError(f"{prompts[0]} and {prompts[1]} are both system prompts; keep one")
    joined = [message for part in parts.values() for message in part]
    return sorted(joined, key=lambda message: message["role"] != "system") if prompts else joined


_PAIRS = "a list of question and answer pairs"


def _history(value: object, form: MessageForm) -> Messages:
    """Earlier questions and answers: pairs, messages, or the JSON text of either. Raises RowError."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        value = parsed(value, "`history`", _PAIRS)
    if is_blank(value):
        return []
    if isinstance(value, list) and all(isinstance(entry, dict) for entry in value):
        return in_order(as_messages(value, "history", form), "`history`", "assistant", form)
    messages: Messages = []
    for number, pair in enumerate(value if isinstance(value, list) else [value], 1):
        if isinstance(pair, list) and not any(pair):
            continue
        if not isinstance(pair, list) or len(pair) != 2:
            raise RowError(f"`history` must be {_PAIRS}")
        name = f"pair {number} of `history`"
        messages += [plain_message("user", pair[0], name), plain_message("assistant", pair[1], name)]
    return messages


def _instruction(row: FileRow) -> Message:
    """The question of an alpaca row: `instruction` with `input` below it. Raises RowError."""
    question = plain_message("user", row["instruction"], "`instruction`")
    if more := optional(row.get("input"), "`input`"):
        question["content"] += "\n" + more
    return question


def prompt(row: FileRow, form: MessageForm) -> Messages:
    """The prompt in `prompt`, `instruction` or `conversations`, after the row's system prompt and `history`.

    It is empty when the row has none of these three columns. Raises RowError.
    """
    if row.get("prompt") is not None:
        asked = _prompt(row, form)
    elif row.get("instruction") is not None:
        asked = [_instruction(row)]
    elif row.get("conversations") is not None:
        asked = in_order(as_messages(row["conversations"], "conversations", form), "`conversations`", "user", form)
    else:
        return []
    return with_context(row, asked, form)


def _prompt(row: FileRow, form: MessageForm) -> Messages:
    return in_order(as_messages(row["prompt"], "prompt", form, "user"), "`prompt`", "user", form)


def answered(row: FileRow, form: MessageForm) -> Messages:
    """The conversation of an alpaca row: `history`, `instruction` with `input`, and `output`. Raises RowError."""
    answer = plain_message("assistant", row["output"], "`output`")
    return with_context(row, [_instruction(row), with_thought(row, answer, "output")], form)


def completed(row: FileRow, form: MessageForm) -> Messages:
    """The conversation in `prompt` and `completion`, each text or messages. Raises RowError."""
    *before, last = as_messages(row["completion"], "completion", form, "assistant")
    both = [*_prompt(row, form), *before, with_thought(row, last, "completion")]
    return with_context(row, in_order(both, "`prompt` and `completion`", "assistant", form), form)


def conversation(row: FileRow, column: str, form: MessageForm) -> Messages:
    """The whole conversation in a column, which must end with the assistant's answer. Raises RowError."""
    return with_context(row, in_order(as_messages(row[column], column, form), f"`{column}`", "assistant", form), form)
