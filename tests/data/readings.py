"""Data sets read to their end, for tests of what was read."""

from stages.data.source import Reading, Source


def read_all(source: Source, shown: int = 3) -> tuple[Reading, list[dict]]:
    """A reading after its last row, and its good rows."""
    reading = Reading(source, shown)
    return reading, [row for _, row in reading.rows()]


def problems(source: Source, shown: int = 3) -> tuple[int, list[str]]:
    """The number of rows read, bad rows included, and the problems."""
    reading, _ = read_all(source, shown)
    return reading.read, reading.problems
