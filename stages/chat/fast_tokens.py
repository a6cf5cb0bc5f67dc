"""A tokenizer's token ids by tiktoken: the same ones, in less than half of the time.

Both do byte-level byte-pair encoding of one word at a time: of the neighbours that may be joined they take those whose
result comes first, the leftmost of several, until none are left. With tiktoken any two may be joined whose bytes
together are a token, and the lowest id comes first; with tokenizers those that its list of merges names, in the list's
order. These agree on every word if

1. the ids of the list's results never fall, and
2. every token, encoded by the list alone, is itself.

For say that they agreed so far and tiktoken may join two pieces to the token t. Nothing was joined across t's ends, so
what was done within t is how the list begins with t alone; by (2) it ends there in t, and the one state of two pieces
that it passes is the last but one, the pair that the list names for t. So both may join the same pieces, and by (1) in
the same order. A word that is a token at once is (2).

What cuts a text into words is a regular expression. Those known here were compared on the letters of Unicode
(tests/chat/test_fast_tokens.py), and are on some whenever a twin is sought. Any other tokenizer is left as it is,
Llama 3's for one, whose list never makes 588 of its tokens.
"""

import json
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tiktoken import Encoding
    from tokenizers import Tokenizer


Ids = list[int]

_LONGEST = 20_000
"""Characters of a text that tiktoken is given: its regular expressions give up on a million spaces."""

_RARE = re.compile("[\U00010000-\U0001efff\ud800-\udfff]")
"""Scripts that Unicode still adds to, so that its versions differ in what is a digit; and halves of letters."""

_MOST = 1000
"""Added tokens: tiktoken goes through all of them with each text."""

_GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_DIGITS = (
    r"\p{N}|'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"  # a digit ends a text for GPT-2
)
_QWEN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_BLOOM = r" ?[^(\s|[.,!?…。，、।۔،])]+"
_PATTERNS = {_QWEN: _QWEN, _BLOOM: rf"{_BLOOM}|(?:(?!{_BLOOM})(?s:.))+"}
"""Of a tokenizer's pattern the one for tiktoken, which drops what no alternative matches."""

Twin = Callable[[str, bool], Ids | None]
"""The token ids of a text, with or without what the tokenizer adds around it; None where it has to be asked itself."""

_twin: "tuple[Tokenizer, Twin] | None" = None


def ids(backend: "Tokenizer", texts: Sequence[str], *, special: bool) -> list[Ids] | None:
    """The token ids of texts, none cut or padded; None for a tokenizer whose twin is not in use."""
    if _twin is None or _twin[0] is not backend:
        return None
    made = [_twin[1](text, special) for text in texts]
    left = [text for text, found in zip(texts, made, strict=True) if found is None]
    others = iter(backend.encode_batch_fast(left, add_special_tokens=special))
    return [next(others).ids if found is None else found for found in made]


@contextmanager
def used(backend: "Tokenizer", found: Twin | None) -> Iterator[None]:
    """Have `ids` ask the twin that was found for a tokenizer."""
    global _twin
    _twin = found and (backend, found)
    try:
        yield
    finally:
        _twin = None


def twin(backend: "Tokenizer") -> Twin | None:
    """What gives a text's token ids as `backend` does; None where that is not proved."""
    told = json.loads(backend.to_str())
    pattern = _pattern(told["pre_tokenizer"])
    added = {token["content"]: token["id"] for token in told["added_tokens"]}
    if pattern is None or not _as_written(told["added_tokens"]) or told["normalizer"] not in (None, {"type": "NFC"}):
        return None
    if backend.encode_special_tokens or len(added) > _MOST:
        return None
    ranks, around = _ranks(told["model"], added), _around(backend)
    if ranks is None or around is None or not _each_is_itself(backend, ranks):
        return None
    from tiktoken import Encoding

    encoding = Encoding("twin", pat_str=pattern, mergeable_ranks=ranks, special_tokens=added)
    found = _encoder(encoding, backend.normalizer, *around)
    probes = list(_probes())
    same = [encoded.ids for encoded in backend.encode_batch_fast(probes, add_special_tokens=True)]
    return (
        found if all(found(probe, True) in (wanted, None) for probe, wanted in zip(probes, same, strict=True)) else None
    )


def _encoder(encoding: "Encoding", normalizer: Any, before: Ids, after: Ids) -> Twin:
    unknown = bytes({*range(256)}.difference(*(token for token in encoding.token_byte_values() if len(token) == 1)))

    def encode(text: str, special: bool) -> Ids | None:
        if len(text) > _LONGEST or _RARE.search(text):
            return None
        if unknown and len(raw := text.encode()) != len(raw.translate(None, unknown)):
            return None
        if normalizer is not None and not text.isascii() and normalizer.normalize_str(text) != text:
            return None  # it is applied between added tokens, each stretch alone
        found = encoding.encode(text, allowed_special="all")
        return [*before, *found, *after] if special else found

    return encode


def _pattern(words: dict[str, Any] | None) -> str | None:
    """tiktoken's pattern for a pre-tokenizer."""
    whole = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
    match [_without_offsets(step) for step in (words or {}).get("pretokenizers", [words])]:
        case [last] if last == whole:
            return _GPT2
        case [{"type": "Digits", "individual_digits": True}, last] if last == whole:
            return _DIGITS
        case [{"type": "Split", "behavior": "Isolated", "invert": False, "pattern": {"Regex": regex}}, last]:
            return _PATTERNS.get(regex) if last == {**whole, "use_regex": False} else None
    return None


def _without_offsets(step: dict[str, Any] | None) -> dict[str, Any]:
    return {name: value for name, value in (step or {}).items() if name != "trim_offsets"}


def _ranks(model: dict[str, Any], added: dict[str, int]) -> dict[bytes, int] | None:
    """The id of each token's bytes, where (1) holds."""
    unlike = ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback", "ignore_merges")
    if model["type"] != "BPE" or any(model.get(name) for name in unlike):
        return None
    vocabulary: dict[str, int] = model["vocab"]
    made = [merge.replace(" ", "") if isinstance(merge, str) else "".join(merge) for merge in model["merges"]]
    try:
        rising = all(first <= second for first, second in pairwise(map(vocabulary.__getitem__, made)))
        ranks = {
            bytes(map(_BYTES.__getitem__, token)): number for token, number in vocabulary.items() if token not in added
        }
    except (KeyError, ValueError):
        return None
    return ranks if rising and added.keys().isdisjoint(made) else None


def _characters() -> dict[str, int]:
    """The byte of each character of a byte-level vocabulary (GPT-2's `bytes_to_unicode`)."""
    shown = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {chr(byte): byte for byte in shown} | {chr(256 + place): byte for place, byte in enumerate(hidden)}


_BYTES = _characters()


def _as_written(added: list[dict[str, Any]]) -> bool:
    """Whether added tokens are found as they stand, and at each place one alone."""
    texts = sorted(token["content"] for token in added)
    moved = any(token[name] for token in added for name in ("lstrip", "rstrip", "single_word", "normalized"))
    return not moved and not any(second.startswith(first) for first, second in pairwise(texts))


def _around(backend: "Tokenizer") -> tuple[Ids, Ids] | None:
    """The token ids that the tokenizer adds before and after a text."""
    alone, whole = (backend.encode("a", add_special_tokens=special).ids for special in (False, True))
    if len(alone) != 1 or whole.count(alone[0]) != 1:
        return None
    place = whole.index(alone[0])
    return whole[:place], whole[place + 1 :]


def _each_is_itself(backend: "Tokenizer", ranks: dict[bytes, int]) -> bool:
    """Whether (2) holds."""
    from tokenizers import Tokenizer

    characters = {byte: character for character, byte in _BYTES.items()}
    tokens = ["".join(map(characters.__getitem__, token)) for token in ranks]
    found = Tokenizer(backend.model).encode_batch_fast(tokens, add_special_tokens=False)
    return all(encoded.ids == [number] for encoded, number in zip(found, ranks.values(), strict=True))


def _probes() -> Iterator[str]:
    """Letters of all kinds, after a letter and after a space, before a digit and a line end."""
    for start in range(0, 0xD800, 256):
        letters = map(chr, range(start, start + 256, 1 if start < 0x800 else 16))
        yield "".join(f"x{letter}1 {letter}\n'{letter}'s  {letter} y" for letter in letters)
