"""A tokenizer's token ids by tiktoken: the same ids, in less than half of the time.

Both libraries do byte-level byte-pair encoding of one word at a time: of the neighbouring pieces that may be joined,
they join the pair whose result has the lowest rank, the leftmost of equal ones, until no pair may be joined. tiktoken
may join any two pieces whose bytes together are a token, and the rank is the token's id. tokenizers may join only the
pairs in its list of merges, and the rank is the place in the list. Both give the same ids for every word if

1. along the list, the ids of the results never fall, and
2. every token, encoded with the list of merges alone, gives itself.

Proof: suppose that both agreed so far, and that tiktoken may join two pieces to the token t. No join so far crossed an
end of t, so the joins inside t are those with which tokenizers begins to encode t alone. By (2) that encoding ends in
t, and its only state of two pieces is the one before t, so the two pieces are the pair that the list names for t. Thus
both may join the same pairs, and by (1) in the same order. A word that is itself a token is (2).

Texts are cut into words by a regular expression. The patterns known here were compared on all letters of Unicode
(tests/chat/test_fast_tokens.py), and are compared on some letters whenever a twin is sought. Other tokenizers have no
twin; one of them is Llama 3's, whose list of merges never gives 588 of its tokens.
"""

import json
import re
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tiktoken import Encoding
    from tokenizers import Tokenizer


Ids = list[int]

_LONGEST = 20_000
"""Characters of the longest text that tiktoken is given: its regular expressions fail on a million spaces."""

_RARE = re.compile("[\U00010000-\U0001efff\ud800-\udfff]")
"""Scripts that Unicode still extends, so that versions of it disagree on what a digit is; and lone surrogates."""

_MOST_ADDED = 1000
"""Added tokens of a tokenizer that gets a twin: tiktoken searches every text for all of them."""

_GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_DIGITS = (
    r"\p{N}|'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"  # a digit ends a text for GPT-2
)
_QWEN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_BLOOM = r" ?[^(\s|[.,!?…。，、।۔،])]+"
_PATTERNS = {_QWEN: _QWEN, _BLOOM: rf"{_BLOOM}|(?:(?!{_BLOOM})(?s:.))+"}
"""A tokenizer's pattern → the same for tiktoken, which drops any characters that the pattern does not match."""

Twin = Callable[[str, bool], Ids | None]
"""(text, special) → token ids, if `special` with the tokens that the tokenizer adds around a text; None for a text that
only the tokenizer itself can encode."""


def token_ids(backend: "Tokenizer", texts: Sequence[str], twin: Twin | None, *, special: bool) -> list[Ids]:
    """The token ids of each text: from the tokenizer's twin where it gives any, or else from the tokenizer itself."""
    if twin is None:
        return [encoded.ids for encoded in backend.encode_batch_fast(list(texts), add_special_tokens=special)]
    by_twin = [twin(text, special) for text in texts]
    others = [text for text, ids in zip(texts, by_twin, strict=True) if ids is None]
    by_backend = iter(backend.encode_batch_fast(others, add_special_tokens=special))
    return [next(by_backend).ids if ids is None else ids for ids in by_twin]


def find_twin(backend: "Tokenizer") -> Twin | None:
    """A function that gives the same token ids as `backend`; None if that is not proved for this tokenizer."""
    described = json.loads(backend.to_str())
    pattern = _pattern(described["pre_tokenizer"])
    added = {token["content"]: token["id"] for token in described["added_tokens"]}
    if pattern is None or not _found_as_written(described["added_tokens"]):
        return None
    if described["normalizer"] not in (None, {"type": "NFC"}):
        return None
    if backend.encode_special_tokens or len(added) > _MOST_ADDED:
        return None
    ranks, around = _ranks(described["model"], added), _around(backend)
    if ranks is None or around is None or not _tokens_give_themselves(backend, ranks):
        return None
    from tiktoken import Encoding

    encoding = Encoding("twin", pat_str=pattern, mergeable_ranks=ranks, special_tokens=added)
    twin = _twin(encoding, backend.normalizer, *around)
    probes = list(_probes())
    expected = [encoded.ids for encoded in backend.encode_batch_fast(probes, add_special_tokens=True)]
    same = all(twin(probe, True) in (ids, None) for probe, ids in zip(probes, expected, strict=True))
    return twin if same else None


def _twin(encoding: "Encoding", normalizer: Any, before: Ids, after: Ids) -> Twin:
    unknown = bytes({*range(256)}.difference(*(token for token in encoding.token_byte_values() if len(token) == 1)))

    def twin(text: str, special: bool) -> Ids | None:
        if len(text) > _LONGEST or _RARE.search(text):
            return None
        if unknown and len(raw := text.encode()) != len(raw.translate(None, unknown)):
            return None
        if normalizer is not None and not text.isascii() and normalizer.normalize_str(text) != text:
            return None  # the tokenizer normalizes each stretch between added tokens alone
        ids = encoding.encode(text, allowed_special="all")
        return [*before, *ids, *after] if special else ids

    return twin


def _pattern(pre_tokenizer: dict[str, Any] | None) -> str | None:
    """tiktoken's pattern for a pre-tokenizer; None for one that is not known here."""
    whole = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
    match [_without_offsets(step) for step in (pre_tokenizer or {}).get("pretokenizers", [pre_tokenizer])]:
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
    """Bytes → id of each token that is not an added one; None if (1) does not hold, or for another kind of model."""
    unsupported = ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback", "ignore_merges")
    if model["type"] != "BPE" or any(model.get(name) for name in unsupported):
        return None
    vocabulary: dict[str, int] = model["vocab"]
    results = [merge.replace(" ", "") if isinstance(merge, str) else "".join(merge) for merge in model["merges"]]
    try:
        rising = all(first <= second for first, second in pairwise(map(vocabulary.__getitem__, results)))
        ranks = {
            bytes(map(_BYTES.__getitem__, token)): number for token, number in vocabulary.items() if token not in added
        }
    except (KeyError, ValueError):
        return None
    return ranks if rising and added.keys().isdisjoint(results) else None


def _characters() -> dict[str, int]:
    """Character of a byte-level vocabulary → its byte; the inverse of GPT-2's `bytes_to_unicode`."""
    shown = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {chr(byte): byte for byte in shown} | {chr(256 + place): byte for place, byte in enumerate(hidden)}


_BYTES = _characters()


def _found_as_written(added: list[dict[str, Any]]) -> bool:
    """Whether added tokens are found exactly as they are written, and never two of them at the same place."""
    texts = sorted(token["content"] for token in added)
    changed = any(token[name] for token in added for name in ("lstrip", "rstrip", "single_word", "normalized"))
    return not changed and not any(second.startswith(first) for first, second in pairwise(texts))


def _around(backend: "Tokenizer") -> tuple[Ids, Ids] | None:
    """The token ids that the tokenizer adds before and after a text; None if that cannot be seen."""
    alone, whole = (backend.encode("a", add_special_tokens=special).ids for special in (False, True))
    if len(alone) != 1 or whole.count(alone[0]) != 1:
        return None
    place = whole.index(alone[0])
    return whole[:place], whole[place + 1 :]


def _tokens_give_themselves(backend: "Tokenizer", ranks: dict[bytes, int]) -> bool:
    """Whether (2) holds."""
    from tokenizers import Tokenizer

    characters = {byte: character for character, byte in _BYTES.items()}
    tokens = ["".join(map(characters.__getitem__, token)) for token in ranks]
    encodings = Tokenizer(backend.model).encode_batch_fast(tokens, add_special_tokens=False)
    return all(encoded.ids == [number] for encoded, number in zip(encodings, ranks.values(), strict=True))


def _probes() -> Iterator[str]:
    """Texts with letters of all kinds, after a letter and after a space, before a digit and before a line end."""
    for start in range(0, 0xD800, 256):
        letters = map(chr, range(start, start + 256, 1 if start < 0x800 else 16))
        yield "".join(f"x{letter}1 {letter}\n'{letter}'s  {letter} y" for letter in letters)
