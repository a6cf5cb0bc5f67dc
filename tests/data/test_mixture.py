"""Data sets mixed by weights: exact shares, and the same rows every time."""

import pytest

from stages.data.mixture import counts, draw


@pytest.mark.parametrize(
    ("available", "weights", "total", "expected"),
    [
        ([1000, 100_000], [1, 5], None, [1000, 5000]),
        ([1000, 2000], [1, 5], None, [400, 2000]),
        ([10, 10], [1, 1], None, [10, 10]),
        ([10, 10, 10], [1, 1, 1], 10, [4, 3, 3]),
        ([100, 100], [0.7, 0.3], 10_000, [7000, 3000]),
        ([5, 5], [1, 3], 100, [25, 75]),
        ([7], [2.5], None, [7]),
        ([0, 10], [1, 1], None, [0, 0]),
    ],
)
def test_how_many_rows_of_each(available, weights, total, expected):
    assert counts(available, weights, total) == expected


def test_every_source_is_within_one_row_of_its_share():
    weights = [0.1, 3, 0.37, 12.5, 1e-3]
    found = counts([50] * 5, weights, 10_000)
    assert sum(found) == 10_000
    assert all(abs(count - 10_000 * weight / sum(weights)) < 1 for count, weight in zip(found, weights, strict=True))


def test_drawing_fewer_takes_different_rows_in_their_order():
    rows = list(range(1000))
    drawn = draw(rows, 100, 42)
    assert len(set(drawn)) == 100
    assert drawn == sorted(drawn)
    assert drawn == draw(rows, 100, 42)
    assert drawn != draw(rows, 100, 43)


def test_drawing_more_takes_every_row_as_often_as_the_others_or_once_more():
    drawn = draw("abcd", 10, 7)
    assert sorted(drawn.count(letter) for letter in "abcd") == [2, 2, 3, 3]
    assert draw("abcd", 8, 7) == list("aabbccdd")


def test_nothing_can_be_drawn_from_nothing():
    assert draw([], 0, 1) == []
    with pytest.raises(ValueError, match="no rows"):
        draw([], 1, 1)
