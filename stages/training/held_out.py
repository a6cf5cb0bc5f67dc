"""How many held-out rows or tokens are too few to say anything about new rows."""

FEW_ROWS = 10  # of conversations or pairs; a figure of 9 pairs moves by 11 points with each of them
FEW_TOKENS = 1000  # in the loss


def few(rows: int, tokens: int | None = None, *, texts: bool = False) -> str | None:
    """The held-out rows or tokens, in words, where they are too few; None where they are enough or not known.

    Rows of `texts` may be few, as they may be long. `tokens` are those in the loss.
    """
    if tokens is not None and tokens < FEW_TOKENS:
        return f"{tokens:,} token{'s' if tokens != 1 else ''}"
    return f"{rows} row{'s' if rows != 1 else ''}" if not texts and 0 < rows < FEW_ROWS else None


def warning(found: str) -> str:
    """A warning about held-out rows that are too few."""
    return f"held out: {found}, so their figures say little about new rows; raise `eval_size`, or add rows"
