"""Which texts share character n-grams: near duplicates by MinHash LSH, and common n-grams for contamination.

Character n-grams, because Chinese has no blanks between words: splitting at blanks makes one word of a sentence.
MinHash: Broder, "On the resemblance and containment of documents", 1997. Bands: Leskovec, Rajaraman and Ullman, "Mining
of Massive Datasets", 3.4. Texts that share a band are compared exactly: every reported pair is similar enough, and a
pair may be missed.
"""

from array import array
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from numpy.typing import NDArray


_GRAM = 5  # characters
_HASHES = 128  # the most min-hashes of a text
_RECALL = 0.99  # the least share of pairs at exactly the similarity asked for that must become candidates
_MARGIN = 4  # standard deviations by which the estimate of a pair's similarity may be too low; 3 of 100,000 are lower
_BATCH = 200_000  # characters hashed together, so that the arrays fit in the processor's cache
_MULTIPLIER = 0x9E3779B97F4A7C15  # 2**64 divided by the golden ratio, an odd number


def repeats(texts: Sequence[str], similarity: float) -> dict[int, tuple[int, float]]:
    """The texts to drop because they are near duplicates of an earlier text that is kept.

    The index of each dropped text → the index of the kept text, and their Jaccard similarity over character 5-grams. A
    text that is similar only to dropped texts is kept. Memory besides the texts: about 500 bytes a text, and 8 bytes a
    character of the texts that share a bucket with another text.
    """
    dropped: dict[int, tuple[int, float]] = {}
    index = _Index(texts, similarity)
    for text, buckets in index.shared:
        similar = index.similar(text, buckets)
        if similar:
            dropped[text] = max(similar, key=lambda match: match[1])
        else:
            index.add(text, buckets)
    return dropped


def collisions(held_out: Sequence[str], training: Sequence[str], similarity: float) -> list[tuple[int, int, float]]:
    """Every pair of a held-out and a training text that are near duplicates: both indices, and their similarity."""
    pairs: list[tuple[int, int, float]] = []
    index = _Index([*held_out, *training], similarity)
    for text, buckets in index.shared:
        if text < len(held_out):
            index.add(text, buckets)
        else:
            pairs += [(other, text - len(held_out), value) for other, value in index.similar(text, buckets)]
    return sorted(pairs)


def common(texts: Sequence[str], against: Sequence[str], size: int) -> dict[int, str]:
    """The texts that share `size` consecutive characters with a text of `against`: index → the first such characters.

    A text shorter than `size` must be the same as a whole text of `against`. Memory: about 30 bytes a character of
    `against`.
    """
    import numpy as np

    shared: dict[int, str] = {}
    if not texts or not against:
        return shared
    known = np.unique(np.concatenate([_hashed(against[start:stop], size)[0] for start, stop in _batches(against)]))
    for start, stop in _batches(texts):
        hashes, counts = _hashed(texts[start:stop], size)
        at = np.minimum(np.searchsorted(known, hashes), len(known) - 1)
        hits = np.flatnonzero(known[at] == hashes)
        begin = np.cumsum(counts) - counts
        numbers, first = np.unique(np.searchsorted(begin, hits, side="right") - 1, return_index=True)
        for number, place in zip(numbers.tolist(), (hits[first] - begin[numbers]).tolist(), strict=True):
            shared[start + number] = texts[start + number][place : place + size]
    return shared


class _Index:
    """Texts by the buckets that they share, to find the added texts that are similar to a text.

    Buckets have no upper size: a text is compared with every member, because leaving some out would miss pairs.
    """

    def __init__(self, texts: Sequence[str], similarity: float) -> None:
        keys, self.sketches = _signatures(texts, similarity)
        self.shared = _shared_buckets(keys)
        self.texts, self.similarity = texts, similarity
        hashes = self.sketches.shape[1]
        self.least_equal = hashes * similarity - _MARGIN * (hashes * similarity * (1 - similarity)) ** 0.5
        self.members: defaultdict[int, array[int]] = defaultdict(lambda: array("q"))
        self.grams: dict[int, NDArray[Any]] = {}

    def add(self, text: int, buckets: Sequence[int]) -> None:
        """Add a text, with which later texts are compared."""
        for bucket in buckets:
            self.members[bucket].append(text)

    def similar(self, text: int, buckets: Sequence[int]) -> list[tuple[int, float]]:
        """The added texts that are similar enough, each with its exact Jaccard similarity to the text.

        Thousands of texts around one long template share a bucket, so those whose min-hashes differ too much are
        discarded first.
        """
        import numpy as np

        members = [np.frombuffer(self.members[bucket], np.int64) for bucket in buckets if bucket in self.members]
        if not members:
            return []
        others = np.unique(np.concatenate(members))
        equal = np.count_nonzero(self.sketches[others] == self.sketches[text], axis=1)
        near = others[equal >= self.least_equal].tolist()
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
    """Min-hashes of a band, and number of bands: the longest bands, for few candidates, that keep the recall."""
    for rows in range(_HASHES, 1, -1):
        bands = _HASHES // rows
        if 1 - (1 - similarity**rows) ** bands >= _RECALL:
            return rows, bands
    return 1, _HASHES


def _batches(texts: Sequence[str]) -> Iterator[tuple[int, int]]:
    """The start and end of each run of texts that are hashed together."""
    start = characters = 0
    for number, text in enumerate(texts):
        characters += len(text)
        if characters >= _BATCH:
            yield start, number + 1
            start, characters = number + 1, 0
    if start < len(texts):
        yield start, len(texts)


def _hashed(texts: Sequence[str], size: int) -> "tuple[NDArray[Any], NDArray[Any]]":
    """A 64-bit hash of every n-gram, text after text, and the number of n-grams of each text.

    A text shorter than `size` is one n-gram.
    """
    import numpy as np

    filled = [text.ljust(size, "\0") for text in texts]
    codes = np.frombuffer("".join(filled).encode("utf-32-le", "surrogatepass"), np.uint32).astype(np.uint64)
    lengths = np.array([len(text) for text in filled])
    windows = len(codes) - size + 1
    hashes = np.zeros(windows, np.uint64)
    for offset in range(size):
        hashes += codes[offset : offset + windows]
        hashes *= np.uint64(_MULTIPLIER)
        hashes ^= hashes >> np.uint64(29)
    inside = np.ones(windows, bool)
    for back in range(1, size):  # a window that starts this close to the end of a text reaches into the next text
        inside[np.cumsum(lengths)[:-1] - back] = False
    return hashes[inside], lengths - size + 1


def _signatures(texts: Sequence[str], similarity: float) -> "tuple[NDArray[Any], NDArray[Any]]":
    """The keys that put texts into buckets, and the sketches that estimate their similarity.

    Keys, bands × texts, 64 bits each: texts with an equal key in a band share a bucket. Sketches, texts × min-hashes,
    the lowest 8 bits of each min-hash: the share of equal ones estimates the Jaccard similarity.
    """
    import numpy as np

    rows, bands = _shape(similarity)
    keys = np.zeros((bands, len(texts)), np.uint64)
    sketches = np.zeros((len(texts), rows * bands), np.uint8)
    factors = _factors(rows * bands)
    for start, stop in _batches(texts):
        hashes, counts = _hashed(texts[start:stop], _GRAM)
        # The upper half is mixed best. Each min-hash multiplies it by another factor, which gives another order.
        mixed = (hashes >> np.uint64(32)).astype(np.uint32)
        begin, ordered = np.cumsum(counts) - counts, np.empty_like(mixed)
        for number, factor in enumerate(factors):
            np.multiply(mixed, np.uint32(factor), out=ordered)
            least = np.minimum.reduceat(ordered, begin)
            sketches[start:stop, number] = least & np.uint32(255)
            key = keys[number // rows, start:stop]
            key += least
            key *= np.uint64(_MULTIPLIER)
            key ^= key >> np.uint64(32)
    return keys, sketches


def _factors(count: int) -> list[int]:
    """Odd 32-bit numbers from splitmix64 (Steele, Lea and Flood, 2014), so that they do not depend on numpy."""
    numbers = []
    for state in range(1, count + 1):
        mixed = state * _MULTIPLIER % 2**64
        mixed = (mixed ^ mixed >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        mixed = (mixed ^ mixed >> 27) * 0x94D049BB133111EB % 2**64
        numbers.append((mixed ^ mixed >> 31) >> 32 | 1)
    return numbers


def _shared_buckets(keys: "NDArray[Any]") -> Iterator[tuple[int, list[int]]]:
    """Each text that shares a bucket with another text, in order, and the numbers of the buckets that it shares."""
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
