"""The nearest known word, and the sentences for errors that a user can fix."""

import errno

import pytest

from stages.runtime.errors import ProcessKilled, StageError, explain, nearest


@pytest.mark.parametrize(
    ("word", "known", "clause"),
    [
        ("lerning_rate", ["learning_rate", "seed"], "; did you mean `learning_rate`?"),
        ("LORA", ["lora"], "; did you mean `lora`?"),
        ("quant", ["quantize_weights", "quantize"], "; did you mean `quantize`?"),
        ("x", ["b", "a"], "; there is `a`, `b`"),
        ("x", [], ""),
        ("x", map(str, range(13)), ""),
    ],
)
def test_the_nearest_known_word(word, known, clause):
    assert nearest(word, known) == clause


def test_a_name_that_moved():
    assert nearest("max_seq_length", ["max_length"], {"max_seq_length": "`max_length`"}) == "; it is now `max_length`"


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (StageError("x.jsonl:2: bad"), "x.jsonl:2: bad"),
        (OSError(errno.ENOSPC, "No space"), "the disk is full; free space and run again, what was finished is kept"),
        (
            RuntimeError("[enforce fail at inline_container.cc:626]"),
            "the disk is full; free space and run again, what was finished is kept",
        ),
        (
            PermissionError(errno.EACCES, "Permission denied", "/saves"),
            "cannot write `/saves` (Permission denied); choose another folder with `--saves DIR`",
        ),
        (ValueError("x"), None),
    ],
)
def test_the_sentence_for_an_error(error, sentence):
    assert explain(error) == sentence


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: 8 bytes")])
def test_too_little_memory(error):
    assert explain(error) == "out of memory; end other programs, or run on a machine with more memory"
    assert explain(error, "halve `batch_tokens`") == "out of memory; halve `batch_tokens`"


def test_a_killed_process_is_named_since_memory_need_not_be_the_reason():
    found = explain(ProcessKilled("a process was killed"), "halve `batch_tokens`")
    why = "kill -9, or the system ran out of memory"
    assert found == f"one of its processes was ended by signal 9 SIGKILL ({why}); halve `batch_tokens`"
