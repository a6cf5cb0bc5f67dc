"""The shape of a conversation: what a chat template can treat differently, without the words.

A data set has few shapes, so each of them can be tried with a template before the first stage starts.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from stages.data.row import Message, Messages, Row, Tools, is_trained

Shape = str
"""One letter for each message (s: system, u: user, a: assistant, t: a tool's output). Small letters after an `a` add
what the message has: `k` a thought in its words, `r` a thought in `reasoning_content`, `w` words beside tool calls, `c`
one tool call, `cc` several, `0` it is not in the loss. A `T` before them stands for declared tools."""

CALLED = "probe_call"
_LETTERS = {"system": "s", "user": "u", "tool": "t"}
_TOOL = {"name": "probe_tool", "description": "d", "parameters": {"type": "object", "properties": {}}}
_LONGEST = 12  # messages of a conversation after which repeated turns are left out of its shape
_MOST = 1000  # shapes of a data set that are counted; conversations with many tool calls can have more
_NAMED = 3  # places of rows that are kept for a shape


def shape(messages: Iterable[Message], tools: Tools | None, *, last_only: bool = False) -> Shape:
    """The shape of a conversation; with `last_only` only its last message is in the loss."""
    codes = [_LETTERS.get(message["role"]) or _answer(message) for message in messages]
    if last_only:
        codes = [code if code[0] != "a" or "0" in code else code + "0" for code in codes[:-1]] + codes[-1:]
    if len(codes) > _LONGEST:
        codes = _shortened(codes)
    return ("T " if tools else "") + " ".join(codes)


def shape_of_row(row: Row) -> str:
    """The shapes of a row's conversations, joined by `|`: one, or two of a pair; empty for a text."""
    if "text" in row:
        return ""
    tools = row.get("tools")
    if "messages" in row:
        return shape(row["messages"], tools)
    answers = [row[name] for name in ("chosen", "rejected", "completion") if name in row]
    return "|".join(dict.fromkeys(shape(row["prompt"] + answer, tools, last_only=True) for answer in answers))


class Shapes:
    """The shapes of the rows of a data set: how many rows have each, and the places of the first ones."""

    def __init__(self, known: Mapping[str, tuple[int, list[str]]] | None = None) -> None:
        self._counts = {of_row: count for of_row, (count, _) in (known or {}).items()}
        self._first = {of_row: first for of_row, (_, first) in (known or {}).items()}

    def add(self, place: str, row: Row) -> None:
        """Count a normalised row."""
        of_row = shape_of_row(row)
        if of_row in self._counts:
            self._counts[of_row] += 1
            if self._counts[of_row] <= _NAMED:
                self._first[of_row].append(place)
        elif of_row and len(self._counts) < _MOST:
            self._counts[of_row], self._first[of_row] = 1, [place]

    def merge(self, later: "Shapes") -> None:
        """Count the rows that follow."""
        for of_row, count in later._counts.items():
            if of_row in self._counts or len(self._counts) < _MOST:
                self._counts[of_row] = self._counts.get(of_row, 0) + count
                self._first[of_row] = [*self._first.get(of_row, []), *later._first[of_row]][:_NAMED]

    @property
    def rows(self) -> int:
        """The number of rows that were counted."""
        return sum(self._counts.values())

    def counted(self) -> Iterator[tuple[list[Shape], tuple[int, list[str]]]]:
        """For each kind of row the shapes of its conversations, the number of rows, and the places of the first."""
        for of_row, count in self._counts.items():
            yield of_row.split("|"), (count, self._first[of_row])

    def all(self) -> list[Shape]:
        """Every shape of a conversation, once."""
        return list(dict.fromkeys(found for of_row in self._counts for found in of_row.split("|")))

    def as_json(self) -> dict[str, tuple[int, list[str]]]:
        """What `Shapes` takes."""
        return {of_row: (count, self._first[of_row]) for of_row, count in self._counts.items()}


def _answer(message: Message) -> str:
    if len(message) == 2:
        return "ak" if "</think>" in message["content"] else "a"
    calls, words = len(message.get("tool_calls") or ()), message["content"].strip()
    code = "a" + "k" * ("</think>" in words) + "r" * bool(message.get("reasoning_content"))
    return code + "w" * bool(calls and words) + "c" * min(calls, 2) + "0" * (not is_trained(message))


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
