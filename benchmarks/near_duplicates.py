"""Near duplicates among planted ones: recall, precision, time and memory, and libraries at the same settings.

    python benchmarks/near_duplicates.py [--rows 100000] [--library-rows 10000]

The texts are made of words under Zipf's law, about 200 characters each. A tenth of the rows are altered copies of an
earlier row, at a Jaccard similarity over character 5-grams of about 0.6 to 1. A planted pair counts for recall when its
similarity, computed here with plain sets, is at least the one asked for. datasketch and rensa are compared if they are
installed. Last come rows around one template: they are no near duplicates up to a template of 175 characters, but most
of them share a bucket.
"""

import argparse
import os
import platform
import random
import resource
import sys
import time
from collections.abc import Callable
from importlib import metadata, util
from itertools import accumulate
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from stages.data import near_duplicates

SIMILARITY = 0.8
HASHES, BANDS, BAND = 126, 21, 6  # what `stages/data/near_duplicates.py` chooses for 0.8; the libraries get the same


def made(rows: int) -> tuple[list[str], list[tuple[int, int]]]:
    """The texts, and the planted pairs: an earlier and a later index."""
    chance = random.Random(7)
    characters = [chr(code) for code in range(0x4E00, 0x4E00 + 3000)]
    words = ["".join(chance.choices(characters, k=chance.choice((1, 2, 2, 2, 3, 4)))) for _ in range(20_000)]
    summed = list(accumulate(1 / rank for rank in range(1, len(words) + 1)))
    marks = ["，", "，", "。", "、", "？"]

    def text() -> str:
        drawn = chance.choices(words, cum_weights=summed, k=chance.randint(60, 120))
        return "".join(word + (chance.choice(marks) if place % 7 == 6 else "") for place, word in enumerate(drawn))

    def altered(original: str) -> str:
        signs = list(original)
        # One changed character changes five 5-grams; n texts' worth of changed share c gives J = (1 - c) / (1 + c).
        share = (1 - (aim := chance.uniform(0.6, 1))) / (1 + aim)
        for _ in range(round(share * len(signs) / 5)):
            at = chance.randrange(len(signs))
            kind = chance.random()
            signs[at] = "" if kind < 0.2 else chance.choice(characters) + (signs[at] if kind > 0.8 else "")
        return "".join(signs)

    copies = rows // 10
    texts = [text() for _ in range(rows - copies)]
    order = list(range(rows))
    chance.shuffle(order)
    originals = chance.sample(range(len(texts)), copies)
    texts += [altered(texts[original]) for original in originals]
    shuffled = [""] * rows
    for before, after in enumerate(order):
        shuffled[after] = texts[before]
    pairs = [(order[original], order[rows - copies + number]) for number, original in enumerate(originals)]
    return shuffled, [(min(pair), max(pair)) for pair in pairs]


def jaccard(one: str, other: str) -> float:
    """By plain sets, apart from what is measured."""
    first, second = ({text[at : at + 5] for at in range(len(text) - 4)} for text in (one, other))
    return len(first & second) / len(first | second)


def with_datasketch(texts: list[str]) -> set[tuple[int, int]]:
    from datasketch import MinHash, MinHashLSH

    lsh = MinHashLSH(num_perm=HASHES, params=(BANDS, BAND))
    pairs = set()
    for number, text in enumerate(texts):
        minhash = MinHash(num_perm=HASHES, seed=1)
        minhash.update_batch([text[at : at + 5].encode() for at in range(len(text) - 4)])
        pairs |= {(other, number) for other in lsh.query(minhash)}
        lsh.insert(number, minhash)
    return {pair for pair in pairs if jaccard(texts[pair[0]], texts[pair[1]]) >= SIMILARITY}


def with_rensa(texts: list[str]) -> set[tuple[int, int]]:
    from rensa import RMinHash, RMinHashLSH

    lsh = RMinHashLSH(threshold=SIMILARITY, num_perm=HASHES, num_bands=BANDS)
    pairs = set()
    for number, text in enumerate(texts):
        minhash = RMinHash(num_perm=HASHES, seed=1)
        minhash.update([text[at : at + 5] for at in range(len(text) - 4)])
        pairs |= {(other, number) for other in lsh.query(minhash)}
        lsh.insert(number, minhash)
    return {pair for pair in pairs if jaccard(texts[pair[0]], texts[pair[1]]) >= SIMILARITY}


def templated(rows: int, length: int) -> list[str]:
    """Texts of 200 characters, of which the first `length` are the same."""
    chance = random.Random(7)
    characters = [chr(code) for code in range(0x4E00, 0x4E00 + 3000)]
    template = "".join(chance.choices(characters, k=length))
    return [template + "".join(chance.choices(characters, k=200 - length)) for _ in range(rows)]


def ours(texts: list[str]) -> set[tuple[int, int]]:
    return {(kept, dropped) for dropped, (kept, _) in near_duplicates.repeats(texts, SIMILARITY).items()}


def measured(name: str, find: Callable[[list[str]], set[tuple[int, int]]], rows: int) -> None:
    texts, planted = made(rows)
    start = time.perf_counter()
    found = find(texts)
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    true = {pair: value for pair in planted if (value := jaccard(texts[pair[0]], texts[pair[1]])) >= SIMILARITY}
    hardest = {pair for pair, value in true.items() if value < SIMILARITY + 0.05}
    right = sum(jaccard(texts[one], texts[other]) >= SIMILARITY for one, other in found)
    print(
        f"| {name} | {rows:,} | {len(true):,} | {len(true.keys() & found) / len(true):.4f} "
        f"| {len(hardest & found) / len(hardest):.4f} | {right / len(found):.4f} "
        f"| {seconds:.1f} | {rows / seconds:,.0f} | {peak:,.0f} |",
        flush=True,
    )


def alone(name: str, find: Callable[[list[str]], set[tuple[int, int]]], rows: int) -> None:
    """In a process of its own, so that its peak memory is its own."""
    if child := os.fork():
        if os.waitpid(child, 0)[1]:
            sys.exit(f"{name} failed")
        return
    measured(name, find, rows)
    sys.stdout.flush()
    os._exit(0)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--library-rows", type=int, default=10_000)
    options = parser.parse_args()
    libraries = {"datasketch": with_datasketch, "rensa": with_rensa}
    there = {name: find for name, find in libraries.items() if util.find_spec(name)}
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("numpy", *there))
    print(f"{_machine()}, {os.cpu_count()} cores; Python {platform.python_version()}, {versions}\n")
    print("| | rows | pairs at 0.8 or more | recall | recall 0.80–0.85 | precision | s | rows/s | MiB in all |")
    print("|---|---|---|---|---|---|---|---|---|", flush=True)
    alone("this project", ours, options.rows)
    alone("this project", ours, options.library_rows)
    for name, find in there.items():
        alone(name, find, options.library_rows)
    print("\n| characters of 200 in the template | their Jaccard similarity | rows | processor s |\n|---|---|---|---|")
    for length in (100, 140, 165, 175, 185):
        for rows in (options.library_rows, options.rows):
            texts = templated(rows, length)
            start = time.process_time()
            ours(texts)
            seconds = time.process_time() - start
            print(f"| {length} | {jaccard(texts[0], texts[1]):.2f} | {rows:,} | {seconds:.1f} |", flush=True)


def _machine() -> str:
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return names[0].split(":")[1].strip() if names else platform.machine()


if __name__ == "__main__":
    main()
