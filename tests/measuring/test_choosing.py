"""Pieces of the methods of `select` on scores that are given."""

import pytest

from stages.measuring import choosing


@pytest.mark.parametrize(("keep", "rows", "count"), [(0.29, 100, 29), (0.1, 5, 1), (0.5, 5, 2), (3, 5, 3), (9, 5, 5)])
def test_a_share_is_the_whole_rows_in_it(keep, rows, count):
    assert choosing.rows_to_keep(keep, rows) == count


def test_ifd_is_a_ratio_and_not_a_number_where_there_is_none():
    first, *others = choosing.ifd([1.0, None, 0.0], [2.0, None, 0.0])
    assert first == 0.5
    assert all(value != value for value in others)


def test_the_highest_of_equal_scores_are_the_first():
    assert choosing.highest([1.0, 2.0, 2.0, 0.0], [3, 2, 1, 0], 2) == [1, 2]


def test_the_best_of_all_and_of_each_cluster_are_joined_once():
    scores, clusters = [5.0, 9.0, 8.0, 1.0, 3.0], [0, 0, 0, 1, 1]
    assert choosing.best_and_spread(scores, clusters, range(5), 2, 1) == [1, 2, 4]
    assert choosing.best_and_spread(scores, clusters, [0, 3], 1, 1) == [0, 3]
