"""The shape of a conversation: what a chat template can treat differently, without the words.

A data set has few shapes, so each of them can be tried with a template before the first stage starts.
"""

from collections.abc import Iterable, Sequence
from typing import Any

from stages.data.row import Message, Messages, Row, Tools

Shape = str
"""One letter for each message (s: system, u: user, a: assistant, t: a tool's output). Small letters after an `a` add
what the message has: `k` a thought in its words, `r` a thought in `reasoning_content`, `w` words beside tool calls, `c`
one tool call, `cc` several, `0` it is not in the loss. A `T` before them stands for declared tools."""

CALLED = "probe_call"
_LETTERS = {"system": "s", "user": "u", "tool": "t"}
_TOOL = {"name": "probe_tool", "description": "d", "parameters": {"type": "object", "properties": {}}}
_LONGEST = 12  # letters of a shape after which repeated turns are left out


def in_loss(message: Message) -> bool:
    """Whether an assistant's message is in the loss."""
    return bool(message.get("weight", 1))


def shape(messages: Iterable[Message], tools: Tools | None, *, last_only: bool = False) -> Shape:
    """The shape of a conversation; with `last_only` only its last message is in the loss."""
    codes = [_LETTERS.get(message["role"]) or _answer(message) for message in messages]
    if last_only:
        codes = [code if code[0] != "a" or "0" in code else code + "0" for code in codes[:-1]] + codes[-1:]
    if len(codes) > _LONGEST:
        codes = _shortened(codes)
    return ("T " if tools else "") + " ".join(codes)


def shapes(row: Row) -> set[Shape]:
    """The shapes of a row's conversations: one, or one for each answer of a pair; none for a text."""
    tools = row.get("tools")
    if "messages" in row:
        return {shape(row["messages"], tools)}
    answers = [row[name] for name in ("chosen", "rejected", "completion") if name in row]
    return {shape(row["prompt"] + answer, tools, last_only=True) for answer in answers}


def _answer(message: Message) -> str:
    if len(message) == 2:
        return "ak" if "</think>" in message["content"] else "a"
    calls, words = len(message.get("tool_calls") or ()), message["content"].strip()
    code = "a" + "k" * ("</think>" in words) + "r" * bool(message.get("reasoning_content"))
    return code + "w" * bool(calls and words) + "c" * min(calls, 2) + "0" * (not in_loss(message))


def _shortened(codes: Sequence[str]) -> list[str]:
    """The codes without every turn that repeats the three before it; a turn is a question and its answers."""
    turns: list[list[str]] = [[]]
    for code in codes:
        if code == "u":
            turns.append([])
        turns[-1].append(code)
    before = [turns[max(0, number - 3) : number] for number in range(len(turns))]
    kept = [turn for turn, three in zip(turns, before, strict=True) if three != [turn] * 3]
    return [code for turn in kept for code in turn]


def has_tools(shape: Shape) -> bool:
    """Whether a conversation declares tools, calls one, or has the answer of one."""
    return any(letter in shape for letter in "Tct")


def probe(shape: Shape) -> tuple[Messages, Tools | None]:
    """A conversation of a shape, in which each text is different from all others."""
    codes = shape.split(" ")
    tools = [{"type": "function", "function": _TOOL}] if codes[0] == "T" else None
    return [_probed(code, number) for number, code in enumerate(codes[bool(tools) :])], tools


def _probed(code: str, number: int) -> Message:
    roles = {letter: role for role, letter in _LETTERS.items()}
    if code[0] != "a":
        return {"role": roles[code[0]], "content": f"words-{number}."}
    calls = code.count("c")
    words = f"words-{number}." if "w" in code or not calls else ""
    message: Message = {"role": "assistant", "content": words}
    if "k" in code:
        message["content"] = f"<think>\nthought-{number}.\n</think>\n\n{words}"
    if "r" in code:
        message["reasoning_content"] = f"thought-{number}."
    if "0" in code:
        message["weight"] = 0
    if calls:
        message["tool_calls"] = [_call(f"{number}-{place}") for place in range(calls)]
    return message


def _call(name: str) -> dict[str, Any]:
    function = {"name": f"{CALLED}-{name}", "arguments": {f"key-{name}": f"value-{name}"}}
    return {"type": "function", "function": function}
