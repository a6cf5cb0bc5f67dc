"""Batches of rows, in which they go through a model."""

from stages.model import inference


def test_batches_hold_the_longest_rows_first_and_no_more_than_they_may():
    assert list(inference.batches([3, 9, 5, 3, 20], 10)) == [[4], [1], [2, 0], [3]]
