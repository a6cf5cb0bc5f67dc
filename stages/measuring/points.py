"""Geometry of embeddings: points in, centres, principal components and clusters out; the same for the same seed."""

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

    The first centre is drawn with `seed`; of equally far points the first is chosen. There are fewer than `count`
    centres if every point is already equal to a centre.

    Returns:
        The indices of the centres in the order chosen, and the distance of each to the nearest centre before it (0 for
        the first).
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
    """The largest distance of a point to its nearest centre."""
    import numpy as np

    nearest = np.full(len(points), np.inf)
    for centre in centres:
        nearest = np.minimum(nearest, _distances(points, points[centre]))
    return float(nearest.max())


def _distances(points: "Points", centre: "Points") -> "Points":
    """‖x_i − c‖₂ for every point; exactly 0 for an equal point."""
    import numpy as np

    parts = [points[start : start + CHUNK] - centre for start in range(0, len(points), CHUNK)]
    distances: Points = np.concatenate([np.linalg.norm(part.astype(np.float64), axis=1) for part in parts])
    return distances


def principal(points: "Points", share: float) -> "Points":
    """Project points on the fewest principal components that explain more than `share` of the variance.

    The components are eigenvectors of the covariance matrix, by falling eigenvalue; each has the sign with which
    its largest entry is positive.

    Returns:
        An array of points × components.
    """
    import numpy as np

    centred = points.astype(np.float64) - points.mean(axis=0, dtype=np.float64)
    values, vectors = np.linalg.eigh(centred.T @ centred)
    values, vectors = np.maximum(values[::-1], 0), vectors[:, ::-1]
    if not values[0]:
        return np.zeros((len(points), 1))
    explained = np.cumsum(values) / values.sum()
    kept = vectors[:, : int(np.searchsorted(explained, share, side="right")) + 1]
    largest = np.abs(kept).argmax(axis=0)
    reduced: Points = centred @ (kept * np.sign(kept[largest, np.arange(kept.shape[1])]))
    return reduced


def k_means(points: "Points", count: int, seed: int) -> list[int]:
    """The cluster of each point: k-means++ (Arthur and Vassilvitskii, 2007), then Lloyd's rounds until no point moves.

    There are fewer than `count` clusters if there are fewer different points. Clusters are numbered in the order of
    their first points.
    """
    centres = _spread(points, count, seed)
    clusters = _nearest(points, centres)
    for _ in range(ROUNDS):
        for cluster in range(len(centres)):
            members = points[clusters == cluster]
            if len(members):  # the centre of an empty cluster does not move
                centres[cluster] = members.mean(axis=0)
        moved = _nearest(points, centres)
        if (moved == clusters).all():
            break
        clusters = moved
    numbers: dict[int, int] = {}
    return [numbers.setdefault(int(cluster), len(numbers)) for cluster in clusters]


def _spread(points: "Points", count: int, seed: int) -> "Points":
    """Centres to start from: the next point is drawn in proportion to its squared distance to the nearest centre."""
    import numpy as np

    generator = np.random.default_rng(seed)
    chosen = [int(generator.integers(len(points)))]
    squared = _distances(points, points[chosen[0]]) ** 2
    while len(chosen) < count and squared.sum() > 0:
        chosen.append(int(generator.choice(len(points), p=squared / squared.sum())))
        squared = np.minimum(squared, _distances(points, points[chosen[-1]]) ** 2)
    return points[chosen].copy()


def _nearest(points: "Points", centres: "Points") -> "NDArray[np.intp]":
    """The index of each point's nearest centre: argmin_c ‖c‖² − 2 x·c; of equally near centres the first."""
    import numpy as np

    lengths = (centres**2).sum(axis=1)
    parts = [points[start : start + CHUNK] for start in range(0, len(points), CHUNK)]
    return np.concatenate([(lengths - 2 * (part @ centres.T)).argmin(axis=1) for part in parts])
