"""Which texts share character n-grams: near duplicates by MinHash LSH, and common n-grams for contamination.

Character n-grams, because Chinese has no blanks between words: splitting at blanks makes one word of a sentence.
MinHash: Broder, "On the resemblance and containment of documents", 1997. Bands: Leskovec, Rajaraman and Ullman, "Mining
of Massive Datasets", 3.4. What LSH finds is compared exactly, so a reported pair is alike; one may be missed.
"""

from array import array
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from numpy.typing import NDArray


_GRAM = 5  # characters
_HASHES = 128  # min-hashes a text has at most
_FOUND = 0.99  # the share of pairs at the very similarity asked for that must become candidates
_MARGIN = 4  # standard deviations that the estimate of a pair's similarity may fall short; 3 of 100,000 fall lower
_BATCH = 200_000  # characters hashed at once, so that the work stays in the cache
_ODD = 0x9E3779B97F4A7C15  # 2**64 over the golden ratio


def repeats(texts: Sequence[str], similarity: float) -> dict[int, tuple[int, float]]:
    """The texts that resemble an earlier kept one: which, and their Jaccard similarity over character 5-grams.

    A text that resembles only dropped ones is kept, so every dropped text has a kept one like it. Memory beside the
    texts: some 500 bytes a text, and 8 bytes a character for those that share a bucket with another.
    """
    dropped: dict[int, tuple[int, float]] = {}
    candidates = _Candidates(texts, similarity)
    for text, buckets in candidates.shared:
        alike = candidates.like(text, buckets)
        if alike:
            dropped[text] = max(alike, key=lambda found: found[1])
        else:
            candidates.add(text, buckets)
    return dropped


def collisions(held_out: Sequence[str], training: Sequence[str], similarity: float) -> list[tuple[int, int, float]]:
    """Every pair of a held-out and a training text that are alike: both indices, and their Jaccard similarity."""
    pairs: list[tuple[int, int, float]] = []
    candidates = _Candidates([*held_out, *training], similarity)
    for text, buckets in candidates.shared:
        if text < len(held_out):
            candidates.add(text, buckets)
        else:
            pairs += [(other, text - len(held_out), value) for other, value in candidates.like(text, buckets)]
    return sorted(pairs)


def common(texts: Sequence[str], against: Sequence[str], size: int) -> dict[int, str]:
    """The texts that share `size` characters in a row with one of `against`, and the first such characters of each.

    A text shorter than that has to be the same as a whole. Memory: some 30 bytes a character of `against`.
    """
    import numpy as np

    found: dict[int, str] = {}
    if not texts or not against:
        return found
    known = np.unique(np.concatenate([_hashed(against[start:stop], size)[0] for start, stop in _batches(against)]))
    for start, stop in _batches(texts):
        hashes, counts = _hashed(texts[start:stop], size)
        at = np.minimum(np.searchsorted(known, hashes), len(known) - 1)
        hits = np.flatnonzero(known[at] == hashes)
        begin = np.cumsum(counts) - counts
        numbers, first = np.unique(np.searchsorted(begin, hits, side="right") - 1, return_index=True)
        for number, place in zip(numbers.tolist(), (hits[first] - begin[numbers]).tolist(), strict=True):
            found[start + number] = texts[start + number][place : place + size]
    return found


class _Candidates:
    """Texts, the buckets that they share, and those of them that later ones are compared with."""

    def __init__(self, texts: Sequence[str], similarity: float) -> None:
        keys, self.signs = _signatures(texts, similarity)
        self.shared = _shared_buckets(keys)
        self.texts, self.similarity = texts, similarity
        hashes = self.signs.shape[1]
        self.agreeing = hashes * similarity - _MARGIN * (hashes * similarity * (1 - similarity)) ** 0.5
        self.members: defaultdict[int, array[int]] = defaultdict(lambda: array("q"))
        self.grams: dict[int, NDArray[Any]] = {}

    def add(self, text: int, buckets: Sequence[int]) -> None:
        """Compare later texts with this one."""
        for bucket in buckets:
            self.members[bucket].append(text)

    def like(self, text: int, buckets: Sequence[int]) -> list[tuple[int, float]]:
        """Those added that are similar enough, with the exact Jaccard similarity.

        Texts around one long template share buckets by the thousand, so min-hashes sort out first.
        """
        import numpy as np

        there = [np.frombuffer(self.members[bucket], np.int64) for bucket in buckets if bucket in self.members]
        if not there:
            return []
        others = np.unique(np.concatenate(there))
        agreeing = np.count_nonzero(self.signs[others] == self.signs[text], axis=1)
        near = others[agreeing >= self.agreeing].tolist()
        if not near:
            return []
        mine = self._grams_of(text)
        theirs = [self._grams_of(other) for other in near]
        sizes = np.array([len(grams) for grams in theirs])
        flat = np.concatenate(theirs)
        at = np.minimum(np.searchsorted(mine, flat), len(mine) - 1)
        common = np.add.reduceat((mine[at] == flat).astype(np.int64), np.cumsum(sizes) - sizes)
        values = common / (len(mine) + sizes - common)
        return [(near[hit], float(values[hit])) for hit in np.flatnonzero(values >= self.similarity).tolist()]

    def _grams_of(self, text: int) -> "NDArray[Any]":
        import numpy as np

        if text not in self.grams:
            self.grams[text] = np.unique(_hashed([self.texts[text]], _GRAM)[0])
        return self.grams[text]


def _shape(similarity: float) -> tuple[int, int]:
    """Min-hashes in a band, and bands: the longest bands, for few candidates, that still find enough."""
    for rows in range(_HASHES, 1, -1):
        bands = _HASHES // rows
        if 1 - (1 - similarity**rows) ** bands >= _FOUND:
            return rows, bands
    return 1, _HASHES


def _batches(texts: Sequence[str]) -> Iterator[tuple[int, int]]:
    start = characters = 0
    for number, text in enumerate(texts):
        characters += len(text)
        if characters >= _BATCH:
            yield start, number + 1
            start, characters = number + 1, 0
    if start < len(texts):
        yield start, len(texts)


def _hashed(texts: Sequence[str], size: int) -> "tuple[NDArray[Any], NDArray[Any]]":
    """A 64-bit hash of every n-gram, text after text, and how many each text has; a short text is one n-gram."""
    import numpy as np

    filled = [text.ljust(size, "\0") for text in texts]
    codes = np.frombuffer("".join(filled).encode("utf-32-le", "surrogatepass"), np.uint32).astype(np.uint64)
    lengths = np.array([len(text) for text in filled])
    windows = len(codes) - size + 1
    hashes = np.zeros(windows, np.uint64)
    for offset in range(size):
        hashes += codes[offset : offset + windows]
        hashes *= np.uint64(_ODD)
        hashes ^= hashes >> np.uint64(29)
    inside = np.ones(windows, bool)
    for back in range(1, size):  # a window that starts so near to a text's end reaches into the next
        inside[np.cumsum(lengths)[:-1] - back] = False
    return hashes[inside], lengths - size + 1


def _signatures(texts: Sequence[str], similarity: float) -> "tuple[NDArray[Any], NDArray[Any]]":
    """What makes texts candidates, and what sorts those out.

    A 64-bit key for each band (row) and text (column): texts with an equal key in a band share a bucket. And eight bits
    of each min-hash (column) of each text (row); the share that agrees estimates the similarity.
    """
    import numpy as np

    rows, bands = _shape(similarity)
    keys = np.zeros((bands, len(texts)), np.uint64)
    signs = np.zeros((len(texts), rows * bands), np.uint8)
    factors = _factors(rows * bands)
    for start, stop in _batches(texts):
        hashes, counts = _hashed(texts[start:stop], _GRAM)
        # The upper half is the better mixed one; a multiplication orders it anew for every min-hash.
        mixed = (hashes >> np.uint64(32)).astype(np.uint32)
        begin, ordered = np.cumsum(counts) - counts, np.empty_like(mixed)
        for number, factor in enumerate(factors):
            np.multiply(mixed, np.uint32(factor), out=ordered)
            least = np.minimum.reduceat(ordered, begin)
            signs[start:stop, number] = least & np.uint32(255)
            key = keys[number // rows, start:stop]
            key += least
            key *= np.uint64(_ODD)
            key ^= key >> np.uint64(32)
    return keys, signs


def _factors(count: int) -> list[int]:
    """Odd 32-bit numbers by splitmix64 (Steele, Lea and Flood, 2014), the same with every version of numpy."""
    numbers = []
    for state in range(1, count + 1):
        mixed = state * _ODD % 2**64
        mixed = (mixed ^ mixed >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        mixed = (mixed ^ mixed >> 27) * 0x94D049BB133111EB % 2**64
        numbers.append((mixed ^ mixed >> 31) >> 32 | 1)
    return numbers


def _shared_buckets(keys: "NDArray[Any]") -> Iterator[tuple[int, list[int]]]:
    """Each text that has a key in common with another, in order, and the numbers of those keys."""
    import numpy as np

    texts, buckets, offset = [], [], 0
    for band in keys:
        order = np.argsort(band, kind="stable")
        starts = np.ones(len(order), bool)
        starts[1:] = band[order[1:]] != band[order[:-1]]
        bucket = np.cumsum(starts) - 1
        shared = np.bincount(bucket)[bucket] > 1
        texts.append(order[shared])
        buckets.append(bucket[shared] + offset)
        offset += len(order)
    text, bucket = np.concatenate(texts), np.concatenate(buckets)
    order = np.argsort(text, kind="stable")
    numbers, first = np.unique(text[order], return_index=True)
    for number, its in zip(numbers.tolist(), np.split(bucket[order], first[1:]), strict=False):
        yield number, its.tolist()
