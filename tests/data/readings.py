"""Data sets read to their end, for tests of what was read."""

from stages.data.source import Reading, Source


def read_all(source: Source) -> tuple[Reading, list[dict]]:
    """A reading after its last row, and its good rows."""
    reading = Reading(source)
    return reading, [row for _, row in reading.rows()]


def problems(source: Source) -> tuple[int, list[str]]:
    """The number of rows read, bad rows included, and the problems."""
    reading, _ = read_all(source)
    return reading.read, reading.problems
