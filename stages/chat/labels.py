"""Conversations in, token ids and labels out.

One template and one way to tokenize serve every stage, the exported folder and the server: the ids that a stage
trains on are those of `tokenizer.apply_chat_template(messages)`.
"""

import functools
import re
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Mapping, Sequence
from itertools import compress
from typing import TYPE_CHECKING, Any, NamedTuple

from stages.chat import fast_tokens
from stages.chat.rendering import Talk, fast_renderer, has_tools, refuse_left_out, rendered
from stages.data.row import Message, Tools
from stages.runtime.errors import StageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100  # the label of a token outside the loss (torch.nn.CrossEntropyLoss)


class Encoded(NamedTuple):
    """A sequence of tokens, and which of them are in the loss."""

    ids: list[int]
    trained: list[tuple[int, int]]
    """The stretches in the loss, in their order and apart: where each begins and ends."""

    @property
    def labels(self) -> list[int]:
        """As long as the ids."""
        labels = [IGNORED] * len(self.ids)
        for begin, end in self.trained:
            labels[begin:end] = self.ids[begin:end]
        return labels


def encode_chat(
    tokenizer: "PreTrainedTokenizerBase", messages: list[Message], tools: Tools | None = None
) -> tuple[list[int], list[int]]:
    """`encode_all` for one conversation: token ids and labels, both of length T."""
    (encoded,) = encode_chats(tokenizer, [(messages, tools)])
    return encoded.ids, encoded.labels


def encode_chats(tokenizer: "PreTrainedTokenizerBase", talks: Sequence[Talk]) -> list[Encoded]:
    """Token ids of each conversation, and the stretches in the loss, which are the assistant's turns.

    Its tool calls are among them, what the tools gave back is not. The end of turn (the special token after the
    answer) is in the loss, or the model would never learn to stop.

    Raises:
        StageError: the template cannot render these messages or tools, its prompt is not how the conversation
            begins, or it does not end the assistant's turn with a special token.
    """
    if not talks:
        return []
    with_tools = [has_tools(talk) for talk in talks]
    refuse_left_out(tokenizer, any(with_tools))
    special = _marks(tokenizer)
    pattern = re.compile("|".join(map(re.escape, sorted(special, key=len, reverse=True))) or r"\Z\b")
    plain = [talk for talk, has_tools in zip(talks, with_tools, strict=True) if not has_tools]
    slow = functools.partial(rendered, tokenizer)
    fast = fast_renderer(tokenizer, plain[0]) if len(plain) > 1 else slow
    renders = [slow if has_tools else fast for has_tools in with_tools]
    full = [render(messages, tools) for render, (messages, tools) in zip(renders, talks, strict=True)]
    ids = token_ids(tokenizer, full)
    marks = [list(pattern.finditer(text)) for text in full]
    turns = list(map(_turns, renders, talks, full, marks))
    ends = list({turn.after: None for found in turns for turn in found or ()})
    known = dict(zip(ends, token_ids(tokenizer, ends), strict=True))
    return [
        (found and _labelled(row, [special[mark[0]] for mark in written], found, known))
        or _by_offsets(tokenizer, talk, text)
        for talk, text, row, written, found in zip(talks, full, ids, marks, turns, strict=True)
    ]


def token_ids(tokenizer: "PreTrainedTokenizerBase", texts: Sequence[str], *, special: bool = False) -> list[list[int]]:
    """The token ids of each text; `special`: with what the tokenizer adds around a text.

    As the tokenizer's own call gives them, without the place of every token, which takes half of its time.
    """
    backend: Any = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    twins = fast_tokens.ids(backend, texts, special=special)
    if twins is not None:
        return twins
    return [encoding.ids for encoding in backend.encode_batch_fast(list(texts), add_special_tokens=special)]


class _Turn(NamedTuple):
    """An assistant's turn without tool calls."""

    marks: int
    """Special tokens before it."""
    after: str
    """Its prompt from the last of these on."""


def _turns(render: Callable[..., str], talk: Talk, text: str, marks: list[re.Match[str]]) -> list[_Turn] | None:
    """The assistant's turns, where they are as plain as most: each ends at the first special token after it."""
    messages, tools = talk
    closed = [mark.end() for mark in marks]
    found: list[_Turn] = []
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt = render(messages[:index], tools, prompt=True)
        before = bisect_right(closed, len(prompt))
        if message.get("tool_calls") or not text.startswith(prompt) or before == len(marks):
            return None
        if text[len(prompt) : marks[before].start()].strip() != message["content"].strip():
            return None
        found.append(_Turn(before, prompt[marks[before - 1].start() if before else 0 :]))
    return found


def _labelled(ids: list[int], marks: list[int], turns: list[_Turn], known: Mapping[str, list[int]]) -> Encoded | None:
    """What is in the loss, found by counting special tokens; None when `marks`, those in the text, are not in `ids`.

    Tokenizers split at their special tokens first and treat what lies between on its own. So a prompt alone is how the
    conversation begins if what follows the prompt's last special token is, and that is the same few words in every row.
    """
    places = [*compress(range(len(ids)), map(frozenset(marks).__contains__, ids))]
    if [ids[place] for place in places] != marks:
        return None
    trained: list[tuple[int, int]] = []
    for before, after in turns:
        first, opening = places[before - 1] if before else 0, known[after]
        begin = first + len(opening)
        if ids[first:begin] != opening:
            return None
        trained.append((begin, places[before] + 1))
    return Encoded(ids, trained)


def _by_offsets(tokenizer: "PreTrainedTokenizerBase", talk: Talk, text: str) -> Encoded:
    """One conversation, the slow way: by the place of every token in the text."""
    messages, tools = talk
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
    trained: list[tuple[int, int]] = []
    special = set(_marks(tokenizer).values())
    for index, message in enumerate(messages):
        if message["role"] == "assistant":
            prompt = rendered(tokenizer, messages[:index], tools, prompt=True)
            if message.get("tool_calls"):
                upto = rendered(tokenizer, messages[: index + 1], tools)
                end = _end_of_calls(special, ids, offsets, prompt, upto, text)
            else:
                end = _end(prompt, message["content"].strip(), text)
            _check_boundary(tokenizer, prompt, ids)
            trained.append(_stretch(tokenizer, special, ids, offsets, len(prompt), end))
    return Encoded(ids, trained)


_GOES_ON = (
    "the chat template writes the start of a conversation differently once it goes on, so what is trained "
    "would not be what is served; choose a built-in `template:`"
)


def _end(prompt: str, answer: str, full: str) -> int:
    """Where the answer after this prompt ends, its end of turn left out."""
    found = full.find(answer, len(prompt))
    if not full.startswith(prompt) or found < 0:
        raise StageError(_GOES_ON)
    return found + len(answer)


def _end_of_calls(
    special: set[int], ids: list[int], offsets: list[tuple[int, int]], prompt: str, upto: str, full: str
) -> int:
    """Where the tool calls after this prompt end: before the last special token of the turn, whose text is `upto`.

    Qwen3's own template writes an empty thought before the last turn only, so that one may be missing.
    """
    turn = upto[len(prompt) :]
    turn = turn if full.startswith(prompt + turn) else _EMPTY_THOUGHT.sub("", turn)
    if not upto.startswith(prompt) or not full.startswith(prompt + turn):
        raise StageError(_GOES_ON)
    stop = len(prompt + turn)
    starts = [
        first
        for token, (first, last) in zip(ids, offsets, strict=True)
        if token in special and first >= len(prompt) and last <= stop
    ]
    if not starts:
        raise StageError(_NO_END)
    return starts[-1]


_EMPTY_THOUGHT = re.compile(r"\A<think>\s*</think>\s*")


def _check_boundary(tokenizer: "PreTrainedTokenizerBase", prompt: str, ids: list[int]) -> None:
    """The prompt alone, as a server tokenizes it, must be how the trained conversation begins."""
    (alone,) = token_ids(tokenizer, [prompt])
    if ids[: len(alone)] != alone:
        raise StageError(
            "this tokenizer joins the end of the prompt with the start of the answer, so the model would be served "
            "another prompt than it was trained on; choose another `template:`"
        )


def _stretch(
    tokenizer: "PreTrainedTokenizerBase",
    special: set[int],
    ids: list[int],
    offsets: list[tuple[int, int]],
    start: int,
    end: int,
) -> tuple[int, int]:
    """The tokens of the characters from `start` to `end`, and on to the special token that ends the turn."""
    first = bisect_right(offsets, start, key=lambda offset: offset[1])
    stop = bisect_left(offsets, end, lo=first, key=lambda offset: offset[0])
    for position in range(stop, len(ids)):
        if ids[position] in special:
            return first, position + 1
        if tokenizer.decode([ids[position]]).strip():
            break
    raise StageError(_NO_END)


_NO_END = (
    "the chat template does not end the assistant's turn with a special token, so the model could not learn "
    "to stop; end it with `{{ eos_token }}` or choose a built-in `template:`"
)


def _marks(tokenizer: "PreTrainedTokenizerBase") -> dict[str, int]:
    """The special tokens, and those that were added to the vocabulary, by their text."""
    special = zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True)
    return dict(special) | {str(token): number for number, token in tokenizer.added_tokens_decoder.items()}


def end_of_turn(tokenizer: "PreTrainedTokenizerBase") -> int:
    """The id of the token that ends an assistant's turn in this tokenizer's template.

    Raises:
        StageError: as `encode`.
    """
    probe = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    _, labels = encode_chat(tokenizer, probe)
    return next(label for label in reversed(labels) if label != IGNORED)
