"""Geometry of rows: points in, centres, principal components and clusters out; numpy alone, all under a seed."""

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Points = NDArray[np.floating[Any]]


ROUNDS = 300  # of k-means at most, as in scikit-learn
CHUNK = 4096  # points whose differences are in memory at once


def k_center(points: "Points", count: int, seed: int) -> tuple[list[int], list[float]]:
    """Greedy k-center (Sener and Savarese, arXiv 1708.00489): next = argmax_i min_c ‖x_i − x_c‖₂.

    The first centre is drawn with `seed`; of points equally far the first is taken. It stops early when every
    point lies on a centre.

    Returns:
        The centres in the order chosen, and how far each was from those before it (0 for the first).
    """
    import numpy as np

    first = random.Random(seed).randrange(len(points))
    chosen, distances = [first], [0.0]
    nearest = _distances(points, points[first])
    while len(chosen) < count:
        farthest = int(np.argmax(nearest))
        if nearest[farthest] <= 0:
            break
        chosen.append(farthest)
        distances.append(float(nearest[farthest]))
        nearest = np.minimum(nearest, _distances(points, points[farthest]))
    return chosen, distances


def radius(points: "Points", centres: Sequence[int]) -> float:
    """How far the farthest point is from its nearest centre."""
    import numpy as np

    nearest = np.full(len(points), np.inf)
    for centre in centres:
        nearest = np.minimum(nearest, _distances(points, points[centre]))
    return float(nearest.max())


def _distances(points: "Points", centre: "Points") -> "Points":
    """‖x_i − c‖₂ for every point, exactly 0 for the same point."""
    import numpy as np

    parts = [points[start : start + CHUNK] - centre for start in range(0, len(points), CHUNK)]
    found: Points = np.concatenate([np.linalg.norm(part.astype(np.float64), axis=1) for part in parts])
    return found


def principal(points: "Points", share: float) -> "Points":
    """Points in the fewest principal components that hold more than `share` of the variance.

    Eigenvectors of the covariance matrix, largest first; the sign of each is that of its largest entry positive.
    """
    import numpy as np

    centred = points.astype(np.float64) - points.mean(axis=0, dtype=np.float64)
    values, vectors = np.linalg.eigh(centred.T @ centred)
    values, vectors = np.maximum(values[::-1], 0), vectors[:, ::-1]
    if not values[0]:
        return np.zeros((len(points), 1))
    held = np.cumsum(values) / values.sum()
    kept = vectors[:, : int(np.searchsorted(held, share, side="right")) + 1]
    largest = np.abs(kept).argmax(axis=0)
    reduced: Points = centred @ (kept * np.sign(kept[largest, np.arange(kept.shape[1])]))
    return reduced


def k_means(points: "Points", count: int, seed: int) -> list[int]:
    """The cluster of each point: k-means++ (Arthur and Vassilvitskii, 2007), then Lloyd's rounds until none moves.

    There are fewer than `count` clusters when there are fewer different points. Clusters are numbered by their
    first point.
    """

    centres = _spread(points, count, seed)
    found = _nearest(points, centres)
    for _ in range(ROUNDS):
        for cluster in range(len(centres)):
            members = points[found == cluster]
            if len(members):  # one that lost all its points stays where it was
                centres[cluster] = members.mean(axis=0)
        moved = _nearest(points, centres)
        if (moved == found).all():
            break
        found = moved
    names: dict[int, int] = {}
    return [names.setdefault(int(cluster), len(names)) for cluster in found]


def _spread(points: "Points", count: int, seed: int) -> "Points":
    """Starting centres: each next point is drawn with a chance proportional to its squared distance to those before."""
    import numpy as np

    generator = np.random.default_rng(seed)
    chosen = [int(generator.integers(len(points)))]
    squared = _distances(points, points[chosen[0]]) ** 2
    while len(chosen) < count and squared.sum() > 0:
        chosen.append(int(generator.choice(len(points), p=squared / squared.sum())))
        squared = np.minimum(squared, _distances(points, points[chosen[-1]]) ** 2)
    return points[chosen].copy()


def _nearest(points: "Points", centres: "Points") -> "NDArray[np.intp]":
    """The nearest centre of each point: argmin_c ‖c‖² − 2 x·c, of equal ones the first."""
    import numpy as np

    lengths = (centres**2).sum(axis=1)
    parts = [points[start : start + CHUNK] for start in range(0, len(points), CHUNK)]
    return np.concatenate([(lengths - 2 * (part @ centres.T)).argmin(axis=1) for part in parts])
