"""Gates on a table that is given: which pass, and what they say."""

import pytest

from stages.measuring import gates

TABLE = {
    "models": ["sft", "merge", "quantize"],
    "figures": [
        {"metric": "perplexity", "data": "held", "model": "sft", "value": 20.0, "ci": None, "why": None},
        {"metric": "perplexity", "data": "held", "model": "merge", "value": 20.0, "ci": [19.0, 21.0], "why": None},
        {"metric": "perplexity", "data": "held", "model": "quantize", "value": 21.5, "ci": [20.0, 23.0], "why": None},
        {"metric": "bleu-4", "data": "held", "model": "quantize", "value": None, "ci": None, "why": "no reference"},
    ],
    "comparisons": [
        {"metric": "perplexity", "data": "held", "model": "quantize", "versus": "merge"}
        | {"as": "ratio", "change": 1.075, "ci": [1.05, 1.1], "n": 64}
    ],
}


@pytest.mark.parametrize(
    ("gate", "passed", "text"),
    [
        (
            {"max_increase": "6%"},
            False,
            "perplexity of `quantize` on `held` is 21.5 (95 % CI 20 to 23); `merge` has 20 (95 % CI 19 to 21): "
            "a change of +1.5 (+7.50%), at most 6% increase is allowed (paired, 64 rows: ratio 1.075, 95 % CI 1.05 to "
            "1.1)",
        ),
        ({"max_increase": "8%"}, True, "at most 8% increase"),
        ({"max_increase": 1.5}, True, "at most 1.5 increase"),
        ({"max_increase": 1}, False, "at most 1 increase"),
        ({"max_decrease": "1%"}, True, "at most 1% decrease"),
        (
            {"max_decrease": 1, "stage": "merge", "versus": "quantize"},
            False,
            "a change of -1.5 (-6.98%), at most 1 dec",
        ),
        ({"max": 21.5}, True, "at most 21.5 is allowed"),
        ({"max": 21}, False, "at most 21 is allowed"),
        ({"min": 22}, False, "at least 22 is wanted"),
        ({"metric": "bleu-4", "min": 0}, False, "bleu-4 of `quantize` on `held` could not be computed (no reference)"),
    ],
)
def test_what_a_gate_says(gate, passed, text):
    verdict = gates.judge_gate(gates.Gate(**{"metric": "perplexity", **gate}), TABLE)
    assert verdict.passed == passed
    assert text in verdict.text
