"""Centres, principal components and clusters of points whose places are known."""

import random

import numpy as np
import pytest

from stages.measuring import points

# Four points on a line. From 0 the farthest is 10, then 4 (4 from 0), then 1; from the others as far as that goes.
LINE = np.array([[0.0], [1.0], [10.0], [4.0]], dtype=np.float32)
ORDERS = {0: [0, 2, 3, 1], 1: [1, 2, 3, 0], 2: [2, 0, 3, 1], 3: [3, 2, 0, 1]}


def test_k_center_takes_the_farthest_point_each_time():
    seen = set()
    for seed in range(12):
        first = random.Random(seed).randrange(4)
        seen.add(first)
        assert points.k_center(LINE, 4, seed)[0] == ORDERS[first]
    assert seen == set(ORDERS)
    seed = next(seed for seed in range(12) if random.Random(seed).randrange(4) == 0)
    assert points.k_center(LINE, 3, seed) == ([0, 2, 3], [0.0, 10.0, 4.0])
    assert points.radius(LINE, [0, 2]) == 4.0


def test_principal_components_hold_the_share():
    line = np.array([[0.0, 0.0], [3.0, 4.0], [6.0, 8.0]])
    assert points.principal(line, 0.95) == pytest.approx(np.array([[-5.0], [0.0], [5.0]]))
    cross = np.array([[3.0, 0.0], [-3.0, 0.0], [0.0, 1.0], [0.0, -1.0]])  # variances 9 : 1
    assert points.principal(cross, 0.85) == pytest.approx(np.array([[3.0], [-3.0], [0.0], [0.0]]))
    assert points.principal(cross, 0.95).shape == (4, 2)
    assert points.principal(np.ones((3, 2)), 0.95).shape == (3, 1)


@pytest.mark.parametrize("seed", range(5))
def test_k_means_finds_groups_that_lie_apart(seed):
    groups = np.array([[0.0, 0.0], [0.0, 1.0], [100.0, 0.0], [1.0, 0.0], [100.0, 1.0], [0.0, 100.0], [1.0, 100.0]])
    assert points.k_means(groups, 3, seed) == [0, 0, 1, 0, 1, 2, 2]
    assert points.k_means(np.ones((3, 2)), 2, seed) == [0, 0, 0]
