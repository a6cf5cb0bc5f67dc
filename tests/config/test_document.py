"""YAML in, values and places out: what a file may hold, and what is refused with its place."""

import math
import os
from pathlib import Path

import pytest

from pipeline.config.document import parse, read
from pipeline.errors import ConfigError


def of(text):
    """The values of a text that has no problem."""
    document = parse(text, "x.yaml")
    assert document.problems == []
    return document.data


def problems(text):
    return parse(text, "x.yaml").problems


TEXT = """\
model: m
stages:
  sft:
    data: [a, 'b']
    trainer: {learning_rate: 5e-5}
  merge:
"""


@pytest.mark.parametrize(
    ("key", "key_place", "value_place"),
    [
        (("model",), "x.yaml:1:1", "x.yaml:1:8"),
        (("stages",), "x.yaml:2:1", "x.yaml:3:3"),
        (("stages", "sft", "data"), "x.yaml:4:5", "x.yaml:4:11"),
        (("stages", "sft", "data", 1), "x.yaml:4:5", "x.yaml:4:15"),
        (("stages", "sft", "trainer", "learning_rate"), "x.yaml:5:15", "x.yaml:5:30"),
        (("stages", "merge"), "x.yaml:6:3", "x.yaml:6:9"),
        (("stages", "sft", "not", "there"), "x.yaml:3:3", "x.yaml:3:3"),
        (("neither",), "x.yaml:1:1", "x.yaml:1:1"),
    ],
)
def test_every_key_and_value_has_its_line_and_column(key, key_place, value_place):
    document = parse(TEXT, "x.yaml")
    assert (document.key_place(key), document.value_place(key)) == (key_place, value_place)


@pytest.mark.parametrize(
    ("written", "value"),
    [
        *[("5e-5", 5e-5), ("1e-4", 1e-4), ("1E+2", 100.0), ("1.", 1.0), (".5", 0.5), ("-2.5", -2.5)],
        *[("16", 16), ("-1", -1), ("+3", 3), ("007", 7), ("0x10", 16), ("0o17", 15)],
        *[(".inf", math.inf), ("-.inf", -math.inf), ("1e999", math.inf)],
        *[("true", True), ("False", False), ("null", None), ("~", None), ("", None)],
        *[("yes", "yes"), ("no", "no"), ("on", "on"), ("off", "off"), ("y", "y"), ("n", "n")],
        *[("'5'", "5"), ('"true"', "true"), ("12:30", "12:30"), ("2024-01-01", "2024-01-01"), ("1_000", "1_000")],
        *[("感冒", "感冒"), ("v1.0.0", "v1.0.0"), ("e5", "e5"), ("|\n  5\n", "5\n"), ("\n  - 1\n  - no", [1, "no"])],
    ],
)
def test_a_word_means_what_yaml_1_2_says(written, value):
    found = of(f"a: {written}")["a"]
    assert (found, type(found)) == (value, type(value))


def test_nan_is_a_number():
    assert math.isnan(of("a: .nan")["a"])


def test_a_number_of_five_thousand_digits_is_read_without_a_crash():
    assert of("a: " + "1" * 5000) == {"a": math.inf}


def test_an_alias_repeats_a_value_and_an_empty_file_is_an_empty_mapping():
    assert of("a: &x {r: 8}\nb: *x\n") == {"a": {"r": 8}, "b": {"r": 8}}
    assert of("") == of("# nothing yet\n") == {}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "a: 1\nb:\n  c: 2\n  c: 3\na: 2\n",
            [
                "x.yaml:4:3: `c` is here twice; it is in line 3 already",
                "x.yaml:5:1: `a` is here twice; it is in line 1 already",
            ],
        ),
        ("a:\n\tb: 1\n", ["x.yaml:2:1: a tab; YAML is indented with spaces"]),
        (
            "a: !!python/object/apply:os.system [ls]\nb: !!str 5\nc: !mine {d: 1}\n",
            [
                "x.yaml:1:4: the tag `!!python/object/apply:os.system` is refused; write a plain value",
                "x.yaml:2:4: the tag `!!str` is refused; write a plain value",
                "x.yaml:3:4: the tag `!mine` is refused; write a plain value",
            ],
        ),
        ("!!map {a: 1}\n", ["x.yaml:1:1: the tag `!!map` is refused; write a plain value"]),
        ("!!python/name:os.system x: 1\n[b]: 2\n", ["x.yaml:1:1: a key is one word", "x.yaml:2:1: a key is one word"]),
        ("a: &x [*x]\n", ["x.yaml:1:4: not valid YAML (nested deeper than 32 levels)"]),
        ("a: " + "[" * 33 + "]" * 33, ["x.yaml:1:36: not valid YAML (nested deeper than 32 levels)"]),
        ("a: " + "[" * 9999, ["x.yaml: not valid YAML (nested deeper than 32 levels)"]),
        ("a: [1\n", ["x.yaml:2:1: not valid YAML (expected ',' or ']', but got '<stream end>')"]),
        ("a: b: c\n", ["x.yaml:1:5: not valid YAML (mapping values are not allowed here)"]),
        ("a: *nope\n", ["x.yaml:1:4: not valid YAML (found undefined alias 'nope')"]),
        (
            "a: 1\n---\nb: 2\n",
            ["x.yaml:2:1: not valid YAML (expected a single document in the stream but found another document)"],
        ),
        (
            "a: \x00\n",
            ["x.yaml: not valid YAML (unacceptable character #x0000: special characters are not allowed)"],
        ),
        ('a: "\\ud83d"\n', ["x.yaml:1:4: half a character (a lone surrogate); write the whole character"]),
        ("- a\n", ["x.yaml:1:1: a config is a mapping such as `stages: …`"]),
        ("a:b\n", ["x.yaml:1:1: a config is a mapping such as `stages: …`"]),
    ],
)
def test_what_is_no_plain_yaml_is_refused_with_its_place(text, expected):
    assert problems(text) == expected


def test_thirty_two_levels_of_lists_are_read():
    assert problems("a: " + "[" * 32 + "]" * 32) == []


def test_ten_lines_of_aliases_cannot_mean_a_billion_values():
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 9)]
    assert problems("\n".join(lines)) == ["x.yaml:1:34: not valid YAML (more values than a config can hold)"]


def test_a_file_is_read_with_or_without_a_byte_order_mark(tmp_path):
    path = tmp_path / "x.yaml"
    for start in (b"", b"\xef\xbb\xbf"):
        path.write_bytes(start + "question: 感冒\n".encode())
        document = read(path)
        assert (document.data, document.keys[("question",)]) == ({"question": "感冒"}, f"{path}:1:1")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("a: 1\nb: 感冒\n".encode("gb18030"), "x.yaml:2: not UTF-8; save the file as UTF-8"),
        (b"a" * 1_000_001, "x.yaml: 1,000,001 bytes are too many for a config; data belongs in files of its own"),
    ],
)
def test_a_file_that_is_no_config_is_refused_before_it_is_parsed(tmp_path, monkeypatch, content, expected):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.yaml").write_bytes(content)
    with pytest.raises(ConfigError) as error:
        read(tmp_path.joinpath("x.yaml").relative_to(tmp_path))
    assert error.value.problems == [expected]


def test_a_missing_file_names_the_yaml_files_there_are(tmp_path):
    for name in ("b.yml", "a.yaml", "c.txt"):
        (tmp_path / name).write_text("stages: {}\n", encoding="utf-8")
    (tmp_path / "other.yaml").write_text("repos: []\n", encoding="utf-8")  # a YAML file of another program
    with pytest.raises(ConfigError) as error:
        read(tmp_path / "x.yaml")
    there = f"`{tmp_path / 'a.yaml'}`, `{tmp_path / 'b.yml'}`"
    reason = os.strerror(2)
    assert error.value.problems == [f"{tmp_path / 'x.yaml'}: cannot be read ({reason}); there is {there}"]


@pytest.mark.parametrize("typed", ["tiny", "tiny.yaml", "configs/tiny", "configs/tinny.yaml"])
def test_a_misspelt_config_names_the_near_one(tmp_path, monkeypatch, typed):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").mkdir()
    for name in ("tiny.yaml", "qwen_med.yaml"):
        (tmp_path / "configs" / name).write_text("stages: {}\n", encoding="utf-8")
    with pytest.raises(ConfigError) as error:
        read(Path(typed))
    assert error.value.problems == [f"{typed}: cannot be read ({os.strerror(2)}); did you mean `configs/tiny.yaml`?"]


def assigned(*assignments):
    document = parse(TEXT, "x.yaml")
    for assignment in assignments:
        document.set(assignment)
    return document


@pytest.mark.parametrize(
    ("assignment", "path", "value"),
    [
        ("model=other", ["model"], "other"),
        ("seed=7", ["seed"], 7),
        ("stages.sft.trainer.learning_rate=2e-5", ["stages", "sft", "trainer", "learning_rate"], 2e-5),
        ("sft.trainer.learning_rate = 2e-5", ["stages", "sft", "trainer", "learning_rate"], 2e-5),
        ("sft.lora.r=8", ["stages", "sft", "lora", "r"], 8),
        ("merge.shard_size=2GB", ["stages", "merge", "shard_size"], "2GB"),
        ("sft.data=[b, c]", ["stages", "sft", "data"], ["b", "c"]),
        ("sft.trainer={beta: 0.1}", ["stages", "sft", "trainer"], {"beta": 0.1}),
        ("sft.trainer=", ["stages", "sft", "trainer"], None),
        ("question=a=b", ["question"], "a=b"),
    ],
)
def test_set_changes_one_value_and_its_place_is_the_command_line(assignment, path, value):
    document = assigned(assignment)
    found = document.data
    for word in path:
        found = found[word]
    assert found == value
    assert document.key_place(tuple(path)) == f"--set {assignment.partition('=')[0]}"


def test_what_is_assigned_last_counts_and_the_rest_stays():
    document = assigned("sft.lora.r=8", "sft.lora.r=4")
    wanted = parse(TEXT, "x.yaml").data
    wanted["stages"]["sft"]["lora"] = {"r": 4}
    assert document.data == wanted


@pytest.mark.parametrize(
    ("assignment", "expected"),
    [
        ("sft.trainer", "--set sft.trainer: write it as `--set key.path=value`"),
        ("=5", "--set =5: write it as `--set key.path=value`"),
        ("sft..r=5", "--set sft..r=5: write it as `--set key.path=value`"),
        ("model.name=5", "--set model.name: `model` is not a mapping"),
        ("sft.data.x=5", "--set sft.data.x: `stages.sft.data` is not a mapping"),
        (
            "sft.data=[a",
            "--set sft.data:1:3: not valid YAML (expected ',' or ']', but got '<stream end>')",
        ),
        ("seed=!!int 5", "--set seed:1:1: the tag `!!int` is refused; write a plain value"),
    ],
)
def test_a_wrong_assignment_says_why(assignment, expected):
    with pytest.raises(ConfigError) as error:
        assigned(assignment)
    assert error.value.problems == [expected]


# Keys of anchors


def test_a_merge_key_takes_over_keys_that_are_not_there():
    text = "x-a: &a {r: 1, s: 2}\nx-b: &b {<<: *a, s: 3, t: 4}\nc: {s: 5, <<: *b}\nd: {<<: [*a, *b], u: 6}\n"
    document = parse(text, "x.yaml")
    assert document.problems == []
    assert (document.data["c"], document.data["d"]) == ({"s": 5, "t": 4, "r": 1}, {"u": 6, "r": 1, "s": 2, "t": 4})
    places = [document.value_place(("c", word)) for word in ("r", "s", "t")]
    assert places == ["x.yaml:1:13", "x.yaml:3:8", "x.yaml:2:27"]


def test_a_key_that_a_mapping_has_is_not_filled_up():
    assert parse("x: &a {t: {r: 1, s: 2}}\nc: {<<: *a, t: {r: 3}}\n", "x.yaml").data["c"] == {"t": {"r": 3}}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("c: {<<: 3}\n", "x.yaml:1:5: `<<` takes mappings, such as `<<: *name`"),
        ("a: &a {r: 1}\nc: {<<: [*a, 3]}\n", "x.yaml:2:5: `<<` takes mappings, such as `<<: *name`"),
        ("c: &c {<<: *c}\n", "x.yaml: not valid YAML (nested deeper than 32 levels)"),
    ],
)
def test_what_cannot_be_merged_says_why(text, expected):
    assert parse(text, "x.yaml").problems == [expected]


def test_a_merge_key_in_quotes_is_a_word():
    assert parse('c: {"<<": {r: 1}}\n', "x.yaml").data == {"c": {"<<": {"r": 1}}}


def test_a_misspelt_stage_in_an_assignment_names_the_path_that_was_meant():
    document = parse("stages: {sft: {data: a}}", "x.yaml")
    with pytest.raises(ConfigError) as error:
        document.set("sftt.trainer.max_steps=2")
    assert error.value.problems == [
        "--set sftt.trainer.max_steps: there is no stage `sftt` here; did you mean `sft.trainer.max_steps`?"
    ]
