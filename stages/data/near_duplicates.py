"""Which texts share character n-grams: near duplicates by MinHash LSH, and common n-grams for contamination.

Character n-grams, because Chinese has no blanks between words: splitting at blanks makes one word of a sentence.
MinHash: Broder, "On the resemblance and containment of documents", 1997. Bands: Leskovec, Rajaraman and Ullman, "Mining
of Massive Datasets", 3.4. Texts that share a band are compared exactly: every reported pair is similar enough, and a
pair may be missed.
"""

from array import array
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from numpy.typing import NDArray


_GRAM = 5  # characters
_HASHES = 128  # the most min-hashes of a text
_RECALL = 0.99  # the least share of pairs at exactly the similarity asked for that must become candidates
_MARGIN = 4  # standard deviations by which the estimate of a pair's similarity may be too low; 3 of 100,000 are lower
_BATCH = 200_000  # characters hashed together, so that the arrays fit in the processor's cache
_CROWD = 100  # texts of a bucket from which on their rarest n-grams are looked at
_COUNTED = 22  # bits of a hash by which n-grams are counted
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

    No member of a bucket is left out, because that would miss pairs. Thousands of texts around one template share
    buckets; of these, `_Prefixes` finds those that can be similar, and the result is the same.
    """

    def __init__(self, texts: Sequence[str], similarity: float) -> None:
        self.keys, self.sketches = _signatures(texts, similarity)
        self.shared = list(_shared_buckets(self.keys))
        sizes = Counter(bucket for _, buckets in self.shared for bucket in buckets)
        self.crowded = {bucket for bucket, size in sizes.items() if size > _CROWD}
        crowd = [text for text, buckets in self.shared if not self.crowded.isdisjoint(buckets)] if self.crowded else []
        self.prefixes = _Prefixes(texts, crowd, similarity) if crowd else None
        self.texts, self.similarity = texts, similarity
        hashes = self.sketches.shape[1]
        self.least_equal = hashes * similarity - _MARGIN * (hashes * similarity * (1 - similarity)) ** 0.5
        self.members: defaultdict[int, array[int]] = defaultdict(lambda: array("q"))
        self.grams: dict[int, NDArray[Any]] = {}

    def add(self, text: int, buckets: Sequence[int]) -> None:
        """Add a text, with which later texts are compared."""
        crowded = False
        for bucket in buckets:
            self.members[bucket].append(text)
            crowded = crowded or bucket in self.crowded
        if crowded and self.prefixes is not None:
            self.prefixes.add(text)

    def similar(self, text: int, buckets: Sequence[int]) -> list[tuple[int, float]]:
        """The added texts that are similar enough, each with its exact Jaccard similarity to the text.

        Those whose min-hashes differ too much are discarded first.
        """
        import numpy as np

        others = self._sharing(text, buckets)
        if not len(others):
            return []
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

    def _sharing(self, text: int, buckets: Sequence[int]) -> "NDArray[Any]":
        """The added texts that share a bucket with a text, without some of a crowded bucket that are not similar."""
        import numpy as np

        there = [bucket for bucket in buckets if bucket in self.members]
        crowded = [bucket for bucket in there if bucket in self.crowded]
        found = None
        if crowded and self.prefixes is not None:
            found = self.prefixes.candidates(text, sum(len(self.members[bucket]) for bucket in crowded))
        if found is not None:
            found = found[(self.keys[:, found] == self.keys[:, text, None]).any(axis=0)]
            there = [bucket for bucket in there if bucket not in self.crowded]
        members = [np.frombuffer(self.members[bucket], np.int64) for bucket in there]
        members += [found] if found is not None else []
        return np.unique(np.concatenate(members)) if members else np.empty(0, np.int64)

    def _grams_of(self, text: int) -> "NDArray[Any]":
        import numpy as np

        if text not in self.grams:
            self.grams[text] = np.unique(_hashed([self.texts[text]], _GRAM)[0])
        return self.grams[text]


class _Prefixes:
    """Which of the added texts can be similar to a text: those that share one of their rarest n-grams with it.

    Prefix filtering (Chaudhuri, Ganti and Kaushik 2006; Bayardo, Ma and Srikant 2007) with the n-grams of every text in
    one order, rare ones first. Of two texts whose Jaccard similarity is at least s, the one with fewer n-grams, n, has
    at least 2s/(1 + s) · n in common with the other one, and the other one, with m, at least s · m. So the first
    n − ⌈2s/(1 + s) · n⌉ + 1 of the one and the first m − ⌈s · m⌉ + 1 of the other share an n-gram. The n-grams of a
    template are in so many texts that they come last and are in neither.
    """

    def __init__(self, texts: Sequence[str], crowd: Sequence[int], similarity: float) -> None:
        """`crowd`: the indices of the texts that will be added or asked for, in order."""
        import numpy as np

        self.place = {text: place for place, text in enumerate(crowd)}
        owner, gram, is_short = _rarest([texts[text] for text in crowd], similarity)
        order = np.argsort(gram, kind="stable")
        new = np.ones(len(order), bool)
        new[1:] = gram[order[1:]] != gram[order[:-1]]
        number = np.empty(len(order), np.int64)
        number[order] = np.cumsum(new) - 1
        shared = np.bincount(number, minlength=1)[number] > 1  # an n-gram of one text finds no other text
        self.gram, self.is_short = number[shared], is_short[shared]
        self.begin = np.searchsorted(owner[shared], np.arange(len(crowd) + 1))
        sizes = [np.bincount(self.gram[which], minlength=number.max(initial=0) + 1) for which in (self.is_short, ...)]
        # For each n-gram the added texts that have it in their shorter and in their longer part, in a common array.
        self.start = [np.cumsum(size) - size for size in sizes]
        self.filled = [np.zeros(len(size), np.int64) for size in sizes]
        self.texts = [np.empty(int(size.sum()), np.int64) for size in sizes]

    def _parts(self, text: int) -> "list[NDArray[Any]]":
        """The n-grams in the shorter and in the longer part of a text."""
        place = self.place[text]
        long = self.gram[self.begin[place] : self.begin[place + 1]]
        return [long[self.is_short[self.begin[place] : self.begin[place + 1]]], long]

    def add(self, text: int) -> None:
        """Add a text, which is a candidate for later texts."""
        for part, grams in enumerate(self._parts(text)):
            self.texts[part][self.start[part][grams] + self.filled[part][grams]] = text
            self.filled[part][grams] += 1

    def candidates(self, text: int, most: int) -> "NDArray[Any] | None":
        """The added texts that can be similar to a text, some of them several times; None if they are `most` or more.

        Raises KeyError when the text is not in the crowd.
        """
        import numpy as np

        short, long = self._parts(text)
        found = []
        for part, grams in enumerate((long, short)):  # shorter parts of the added texts, and then their longer parts
            filled = self.filled[part][grams]
            starts = self.start[part][grams]
            for place in np.flatnonzero(filled).tolist():
                found.append(self.texts[part][starts[place] : starts[place] + filled[place]])
                most -= int(filled[place])
                if most <= 0:
                    return None
        return np.unique(np.concatenate(found)) if found else np.empty(0, np.int64)


def _rarest(texts: Sequence[str], similarity: float) -> "tuple[NDArray[Any], NDArray[Any], NDArray[Any]]":
    """The rarest n-grams of each text, as many as `_Prefixes` needs: index of the text, n-gram, whether it is in the
    shorter part. The texts are in order.
    """
    import numpy as np

    counts = np.zeros(2**_COUNTED, np.uint32)  # n-grams with the same highest bits are counted together
    for start, stop in _batches(texts):
        highest, times = np.unique(_hashed(texts[start:stop], _GRAM)[0] >> np.uint64(64 - _COUNTED), return_counts=True)
        counts[highest] += times.astype(np.uint32)
    owners, grams, shorts = [np.empty(0, np.int64)], [np.empty(0, np.uint64)], [np.empty(0, bool)]
    for start, stop in _batches(texts):
        hashes, lengths = _hashed(texts[start:stop], _GRAM)
        owner = np.repeat(np.arange(len(lengths)), lengths)
        often = np.minimum(counts[hashes >> np.uint64(64 - _COUNTED)], 2**_COUNTED - 1).astype(np.uint64)
        ranked = (often << np.uint64(64 - _COUNTED)) | (hashes & np.uint64(2 ** (64 - _COUNTED) - 1))
        order = np.lexsort((ranked, owner))
        owner, ranked = owner[order], ranked[order]
        new = np.ones(len(order), bool)
        new[1:] = (ranked[1:] != ranked[:-1]) | (owner[1:] != owner[:-1])
        owner, ranked = owner[new], ranked[new]
        size = np.bincount(owner, minlength=len(lengths))
        place = np.arange(len(owner)) - (np.cumsum(size) - size)[owner]
        # A little less than the bound, so that rounding leaves nothing out.
        longer = size - np.ceil(similarity * size - 1e-6) + 1
        shorter = size - np.ceil(2 * similarity / (1 + similarity) * size - 1e-6) + 1
        kept = place < longer[owner]
        owners.append(owner[kept] + start)
        grams.append(ranked[kept])
        shorts.append(place[kept] < shorter[owner[kept]])
    return np.concatenate(owners), np.concatenate(grams), np.concatenate(shorts)


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
