"""tiktoken in place of a tokenizer: the same ids for every text, or no ids."""

import json
import random
from itertools import chain
from pathlib import Path

import pytest
import tiktoken
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from stages.chat import fast_tokens
from stages.chat.encoder import Encoder

DATA = Path(__file__).parents[2] / "data"
MARKS = ["<|im_start|>", "<|im_end|>"]
PIECES = [  # what tokenizers stumble over
    *MARKS,
    *"0٣²½ⅧÉ\u0301\u212a\u212b\u0338()|[…。한가🙂\ud7ff\ue000\U0010ffff\n\t\x85\xa0\u3000\u200b\ufeff\0",
    *(
        "<|im_end",
        "'s",
        "'LL",
        "'ſ",
        "12",
        "1234567",
        "1.5",
        "the",
        " don't",
        "e\u0301",
        "👨‍👩‍👧",
        "医生，",
        "\x04\x06",
    ),
    *("a" * 50, "。" * 20, "你" * 30, " ", "  ", "\r\n", "高血压患者应注意饮食。"),
]


def words(kind: str):
    """The pre-tokenizer that models of a kind come with."""
    whole = pre_tokenizers.ByteLevel(add_prefix_space=False)
    match kind:
        case "gpt2":
            return whole
        case "smollm2":
            return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), whole])
        case _:
            regex = {"qwen": fast_tokens._QWEN, "bloom": fast_tokens._BLOOM}[kind]
            split = pre_tokenizers.Split(Regex(regex), "isolated")
            return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])


def trained(kind: str, alphabet=None, pieces=PIECES) -> Tokenizer:
    """A tokenizer of a kind, trained on this project's own rows and a little of everything."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = words(kind), decoders.ByteLevel()
    if kind == "qwen":
        made.normalizer = normalizers.NFC()
    rows = json.loads((DATA / "med_qa.json").read_text(encoding="utf-8"))
    texts = chain((row["output"] for row in rows), pieces * 3, [Path(__file__).read_text(encoding="utf-8")])
    known = pre_tokenizers.ByteLevel.alphabet() if alphabet is None else alphabet
    made.train_from_iterator(
        texts,
        trainers.BpeTrainer(vocab_size=2000, special_tokens=MARKS, initial_alphabet=known, show_progress=False),
    )
    if kind == "smollm2":
        marks = [(mark, made.token_to_id(mark)) for mark in MARKS]
        single = "<|im_start|> $A <|im_end|> <|im_end|>"
        made.post_processor = processors.TemplateProcessing(single=single, special_tokens=marks)
    return made


KINDS = ["gpt2", "smollm2", "qwen", "bloom"]


@pytest.fixture(scope="module")
def both():
    """A kind's tokenizer and its twin, made once."""
    made = {}

    def get(kind):
        if kind not in made:
            backend = trained(kind)
            made[kind] = (backend, fast_tokens.find_twin(backend))
        backend, twin = made[kind]
        assert twin is not None
        return backend, twin

    return get


def mixed(chance: random.Random) -> str:
    """Letters of all of Unicode among what tokenizers stumble over."""
    ranges = [(0, 0x80), (0, 0x3000), (0x4E00, 0x9FFF), (0, 0xD800), (0xE000, 0x110000)]
    letters = (chr(chance.randrange(*chance.choice(ranges))) for _ in range(40))
    drawn = (chance.choice(PIECES) if chance.random() < 0.4 else letter for letter in letters)
    return "".join(list(drawn)[: chance.randint(1, 40)])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("special", [False, True])
def test_the_ids_are_the_tokenizers_own(both, kind, special):
    backend, twin = both(kind)
    chance = random.Random(7)
    texts = ["", *PIECES, *(mixed(chance) for _ in range(600))]
    own = [encoded.ids for encoded in backend.encode_batch_fast(texts, add_special_tokens=special)]
    asked = [twin(text, special) for text in texts]
    assert sum(found is not None for found in asked) > len(texts) / 2
    assert [
        (text, found) for text, found, wanted in zip(texts, asked, own, strict=True) if found not in (None, wanted)
    ] == []
    assert fast_tokens.token_ids(backend, texts, twin, special=special) == own
    assert fast_tokens.token_ids(backend, texts, None, special=special) == own


@pytest.mark.parametrize("kind", KINDS)
def test_every_letter_is_of_the_same_class(kind):
    """Each is put after what shows its class: a vocabulary that joins `a`, `1`, `!`, a space or a line end with the
    first byte of any letter does so only where both are of one word."""
    characters = {byte: character for character, byte in fast_tokens._BYTES.items()}
    firsts = [characters[byte] for byte in [*range(0x80), *range(0xC2, 0xF5)]]
    merges = [(characters[ord(before)], first) for before in "a1! \n'" for first in firsts]
    vocabulary = {token: number for number, token in enumerate([*characters.values(), *map("".join, merges)])}
    backend = Tokenizer(models.BPE(vocabulary, merges))
    backend.pre_tokenizer = words(kind)
    twin = fast_tokens.find_twin(backend)
    for start in [*range(0, 0x10000, 256), *range(0x1F000, 0x20000, 256), 0x20000, 0x30000, 0xE0000]:
        step = 64 if chr(start).isalpha() and chr(start + 255).isalpha() and start >= 0x3400 else 1  # Han and Hangul
        letters = [chr(code) for code in range(start, start + 256, step) if not 0xD800 <= code < 0xE000]
        text = "".join(f"a{letter}1{letter}!{letter} {letter}\n{letter}'{letter}" for letter in letters)
        assert twin(text, False) == backend.encode(text).ids, hex(start)
    for letter in "\U00010000\U00011de0\U0001efff":  # the second is a digit of Unicode 17
        assert twin(f"a{letter}", False) is None


def change(described: dict, name: str) -> None:
    """Make a tokenizer one whose ids tiktoken could miss."""
    model, added = described["model"], described["added_tokens"]
    match name:
        case "an id that falls":
            model["merges"][5], model["merges"][900] = model["merges"][900], model["merges"][5]
        case "a token that no merge makes":
            model["vocab"]["qqqq"] = 5000
        case "a token that no merge makes, of a model that looks words up":
            model["vocab"]["qqqq"], model["ignore_merges"] = 5000, True
        case "a token that other merges come before":
            vocabulary = {character: number for number, character in enumerate(pre_tokenizers.ByteLevel.alphabet())}
            model["vocab"] = vocabulary | {"ab": 256, "bc": 257, "abc": 258}
            model["merges"] = [["a", "b"], ["b", "c"], ["a", "bc"]]
            described["added_tokens"], described["post_processor"] = [], None
        case "merges that are left out at random":
            model["dropout"] = 0.1
        case "another normalizer":
            described["normalizer"] = {"type": "Lowercase"}
        case "another pattern":
            described["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = r"\s+|\S+"
        case "a space before the text":
            described["pre_tokenizer"]["pretokenizers"][1]["add_prefix_space"] = True
        case "numbers that stay whole":
            described["pre_tokenizer"]["pretokenizers"][0] = {"type": "Digits", "individual_digits": False}
            described["pre_tokenizer"]["pretokenizers"][1]["use_regex"] = True
        case "words that are left out":
            described["pre_tokenizer"]["pretokenizers"][0]["behavior"] = "Removed"
        case "what is between words":
            described["pre_tokenizer"]["pretokenizers"][0]["invert"] = True
        case "words of another kind":
            described["pre_tokenizer"] = {"type": "Whitespace"}
        case "no words":
            described["pre_tokenizer"] = None
        case "an added token that takes the space before it":
            added[0]["lstrip"] = True
        case "an added token that takes the space after it":
            added[0]["rstrip"] = True
        case "an added token that is no part of a word":
            added[0]["single_word"] = True
        case "an added token that is sought later":
            added[0]["normalized"] = True
        case "an added token that is spelt as one of the model is":
            added.append({**added[0], "content": "".join(model["merges"][-1]), "id": 5000})
        case "too many added tokens":
            added += [{**added[0], "content": f"<{number}>", "id": 5000 + number} for number in range(1000)]
        case "an added token that begins another":
            added.append({**added[0], "content": MARKS[0][:-2], "id": 5000})
        case "another model":
            described["model"] = {"type": "WordLevel", "vocab": model["vocab"], "unk_token": "a"}


@pytest.mark.parametrize(
    "name",
    [
        "an id that falls",
        "a token that no merge makes",
        "a token that no merge makes, of a model that looks words up",
        "a token that other merges come before",
        "merges that are left out at random",
        "another normalizer",
        "another pattern",
        "a space before the text",
        "numbers that stay whole",
        "words that are left out",
        "what is between words",
        "words of another kind",
        "no words",
        "an added token that takes the space before it",
        "an added token that takes the space after it",
        "an added token that is no part of a word",
        "an added token that is sought later",
        "an added token that is spelt as one of the model is",
        "too many added tokens",
        "an added token that begins another",
        "another model",
    ],
)
def test_a_tokenizer_that_tiktoken_could_miss_is_left_alone(both, name):
    described = json.loads(both("qwen")[0].to_str())
    before = json.dumps(described)
    change(described, name)
    assert json.dumps(described) != before
    assert fast_tokens.find_twin(Tokenizer.from_str(json.dumps(described))) is None


def test_it_does_miss_a_token_that_other_merges_come_before(both):
    described = json.loads(both("gpt2")[0].to_str())
    change(described, "a token that other merges come before")
    vocabulary = described["model"]["vocab"]
    ranks = {bytes(map(fast_tokens._BYTES.__getitem__, token)): number for token, number in vocabulary.items()}
    theirs = tiktoken.Encoding("x", pat_str=r"\S+", mergeable_ranks=ranks, special_tokens={})
    assert theirs.encode("abc") == [258]
    assert Tokenizer.from_str(json.dumps(described)).encode("abc").ids == [256, vocabulary["c"]]


@pytest.mark.parametrize(
    ("kind", "text"),
    [("gpt2", "你好 " * 10_000), ("gpt2", " " * 200_000), ("qwen", "e\u0301"), ("qwen", "<|im_end|>\u0338")],
    ids=["long", "spaces", "not in form C", "in form C it would be no mark"],
)
def test_a_text_that_tiktoken_could_miss_goes_to_the_tokenizer(both, kind, text):
    backend, twin = both(kind)
    assert twin(text, False) is None
    texts = ["a", text, "b"]
    own = [backend.encode(text).ids for text in texts]
    assert fast_tokens.token_ids(backend, texts, twin, special=False) == own


def test_a_byte_that_the_vocabulary_lacks_goes_to_the_tokenizer():
    alphabet = [character for character, byte in fast_tokens._BYTES.items() if byte not in (4, 0xF1)]
    backend = trained("gpt2", alphabet, [piece for piece in PIECES if "\x04" not in piece])
    twin = fast_tokens.find_twin(backend)
    for text in ("a\x04b", "a\U00040000b"):  # the second's bytes begin with 0xF1
        assert twin(text, False) is None
        assert fast_tokens.token_ids(backend, [text], twin, special=False) == [backend.encode(text).ids]
    assert twin("a\U0001f642b", False) == backend.encode("a\U0001f642b").ids


def test_what_is_added_around_a_text(both):
    backend, twin = both("smollm2")
    first, last = map(backend.token_to_id, MARKS)
    assert twin("你好", True) == [first, *twin("你好", False), last, last]


def test_an_added_token_counts(both):
    backend = Tokenizer.from_str(both("gpt2")[0].to_str())
    backend.add_special_tokens([AddedToken("<|eot|>", special=True)])
    assert fast_tokens.find_twin(backend)("a<|eot|>", False) == backend.encode("a<|eot|>").ids
    assert backend.encode("a<|eot|>").ids[1:] == [backend.token_to_id("<|eot|>")]


def test_a_tokenizer_that_cuts_its_marks_is_left_alone(both):
    backend = Tokenizer.from_str(both("gpt2")[0].to_str())
    backend.encode_special_tokens = True  # transformers' `split_special_tokens`; it is not in to_str()
    assert fast_tokens.find_twin(backend) is None


def encoder(backend: Tokenizer) -> Encoder:
    from transformers import PreTrainedTokenizerFast

    return Encoder(PreTrainedTokenizerFast(tokenizer_object=backend))


@pytest.mark.parametrize("kind", KINDS)
def test_an_encoder_asks_the_twin_once_it_has_one(both, kind, monkeypatch):
    asked = []

    def counted(backend):
        twin = find(backend)
        return lambda text, special: (asked.append(text), twin(text, special))[1]

    find = fast_tokens.find_twin
    monkeypatch.setattr(fast_tokens, "find_twin", counted)
    alone = encoder(Tokenizer.from_str(both(kind)[0].to_str()))
    fast, texts = alone.with_twin(), ["", *PIECES]
    for special in (False, True):
        assert fast.token_ids(texts, special=special) == alone.token_ids(texts, special=special)
    assert asked == texts * 2


def test_encoders_share_nothing(both):
    """The twin of one tokenizer is never asked for another, in whatever order they are used."""
    first, second = (encoder(Tokenizer.from_str(both(kind)[0].to_str())) for kind in ("gpt2", "bloom"))
    own = [first.token_ids(PIECES), second.token_ids(PIECES)]
    assert own[0] != own[1]
    fast = first.with_twin()
    assert [used.token_ids(PIECES) for used in (fast, second, first)] == [own[0], own[1], own[0]]
    assert (first.twin, second.twin) == (None, None)


def test_an_encoder_of_a_tokenizer_without_a_twin_asks_the_tokenizer(both):
    described = json.loads(both("qwen")[0].to_str())
    change(described, "words of another kind")
    alone = encoder(Tokenizer.from_str(json.dumps(described)))
    assert alone.with_twin().twin is None
    assert alone.with_twin().token_ids(PIECES) == alone.token_ids(PIECES)


def test_an_encoder_neither_cuts_nor_pads(both):
    backend = Tokenizer.from_str(both("gpt2")[0].to_str())
    own = [backend.encode(text).ids for text in PIECES]
    backend.enable_truncation(2)
    backend.enable_padding()
    assert encoder(backend).token_ids(PIECES) == own
