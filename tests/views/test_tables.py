"""What the commands print besides the live view."""

import io

from rich.console import Console

from pipeline.views import tables
from pipeline.views.samples import DataView, Sample
from stages.data import cleaning


def printed(*parts):
    file = io.StringIO()
    sample = Sample([(text, in_loss) for text, in_loss in parts])
    tables.print_data(Console(file=file, width=80), DataView("d", "sft", cleaning.Account(), None, [sample]))
    return file.getvalue().split("sequence 1\n")[1].rstrip("\n")


def test_both_answers_of_a_pair_are_named():
    file = io.StringIO()
    samples = [Sample([("a", True)], label="chosen"), Sample([("b", True)], label="rejected"), Sample([("c", True)])]
    tables.print_data(Console(file=file, width=80), DataView("d", "dpo", cleaning.Account(), None, samples))
    heads = [line.strip() for line in file.getvalue().splitlines() if "sequence " in line]
    assert heads == ["sequence 1, chosen", "sequence 2, rejected", "sequence 3"]


def test_a_short_sequence_is_shown_whole():
    assert printed(("question ", False), ("answer", True)) == "question ⟦answer⟧"
    whole = "a" * 6000
    assert printed((whole, True)) == f"⟦{whole}⟧"


def test_of_a_long_sequence_the_start_and_the_end_are_shown_with_the_count_of_the_rest():
    words = "".join(f"{number:06}" for number in range(50_000))
    assert printed((words, False), ("answer", True)) == (
        f"{words[:4500]}\n  … 294,006 characters are not shown …\n{words[-1494:]}⟦answer⟧"
    )
    assert printed(("p" * 10, False), (words, True)) == (
        f"{'p' * 10}⟦{words[:4490]}⟧\n  … 294,010 characters are not shown …\n⟦{words[-1500:]}⟧"
    )
