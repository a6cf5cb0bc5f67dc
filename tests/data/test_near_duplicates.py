"""Near duplicates among rows around one template: the same pairs as by comparing all, without comparing all."""

import random

import pytest

from stages.data import near_duplicates


def grams(text):
    return {text[at : at + 5] for at in range(max(1, len(text) - 4))}


def similarity(one, other):
    first, second = grams(one), grams(other)
    return len(first & second) / len(first | second)


def around_templates(rows, seed):
    """Texts of different lengths around three templates, at all similarities, and altered copies."""
    chance = random.Random(seed)
    signs = [chr(code) for code in range(0x4E00, 0x4E00 + 400)]
    templates = ["".join(chance.choices(signs, k=length)) for length in (40, 90, 160)]
    texts = []
    for _ in range(rows):
        own = "".join(chance.choices(signs, k=chance.choice((3, 8, 12, 18, 25, 40, 70))))
        text = chance.choice(templates) + own
        if texts and chance.random() < 0.3:
            signs_of = list(chance.choice(texts))
            for _ in range(chance.randrange(4)):
                signs_of[chance.randrange(len(signs_of))] = chance.choice(signs)
            text = "".join(signs_of)[: chance.randrange(20, 240)]
        texts.append(text)
    return texts


@pytest.mark.parametrize("asked", [0.5, 0.7, 0.8, 0.9, 1.0])
def test_what_is_left_out_of_a_crowded_bucket_is_not_similar(asked, monkeypatch):
    texts = around_templates(400, seed=3)
    monkeypatch.setattr(near_duplicates, "_CROWD", 10**9)
    repeats = near_duplicates.repeats(texts, asked)
    pairs = near_duplicates.collisions(texts[:80], texts[80:], asked)
    assert len(repeats) > 20
    for crowd in (1, 5, 50):
        monkeypatch.setattr(near_duplicates, "_CROWD", crowd)
        assert near_duplicates.repeats(texts, asked) == repeats
        assert near_duplicates.collisions(texts[:80], texts[80:], asked) == pairs


@pytest.mark.parametrize("asked", [0.5, 0.8, 0.95])
def test_every_pair_that_is_similar_shares_one_of_its_rarest_ngrams(asked):
    texts = around_templates(200, seed=4)
    prefixes = near_duplicates._Prefixes(texts, range(len(texts)), asked)
    for text in range(len(texts)):
        found = set(prefixes.candidates(text, 10**9).tolist())
        assert {other for other in range(text) if similarity(texts[text], texts[other]) >= asked} <= found
        prefixes.add(text)


@pytest.mark.parametrize("template", [140, 165, 175])  # of 200 characters: a Jaccard similarity of 0.5, 0.7 and 0.78
def test_rows_around_one_template_are_not_compared_with_each_other(template, monkeypatch):
    chance = random.Random(7)
    signs = [chr(code) for code in range(0x4E00, 0x4E00 + 3000)]
    start = "".join(chance.choices(signs, k=template))
    texts = [start + "".join(chance.choices(signs, k=200 - template)) for _ in range(1200)]
    compared = []
    sharing = near_duplicates._Index._sharing

    def counted(self, text, buckets):
        found = sharing(self, text, buckets)
        compared.append(len(found))
        return found

    monkeypatch.setattr(near_duplicates._Index, "_sharing", counted)
    assert near_duplicates.repeats(texts, 0.8) == {}
    assert sum(compared) < 20 * len(texts)  # every row with every earlier one would be 720,000
