"""Figures of known rows, their intervals and comparisons, and the table of metrics."""

import math

import pytest

from stages.measuring.metrics import (
    METRICS,
    Measured,
    bleu,
    compare_models,
    figure_of,
    lower_is_better,
    mcnemar,
    metric_names,
    repetition,
    rouge,
    score_answer,
)


def test_every_metric_has_a_direction_and_metrics_of_tasks_are_better_when_higher():
    lower = [name for name in METRICS if lower_is_better(name)]
    assert lower == ["perplexity", "bits_per_byte", "repetition"]
    assert [name for name in METRICS if lower_is_better(name) is None] == ["answer_tokens"]
    assert lower_is_better("acc") is False
    assert [name for name, metric in METRICS.items() if metric.share] == [
        *("answer_match", "preference_accuracy", "preference_accuracy_per_token", "reward_accuracy", "stop_rate"),
    ]


def test_an_answer_has_every_metric_of_answers():
    found = score_answer("a", [1, 2, 3, 4], reference=None, stopped=True)
    assert tuple(found) == metric_names("reference", "answer")
    assert [found[name] for name in metric_names("reference")] == [None] * 4


def rows(*values, size=1.0):
    return Measured([(value, size) for value in values])


def test_perplexity_is_that_of_all_tokens_and_not_the_mean_of_rows():
    measured = Measured([(2.0, 1.0), (3.0, 9.0)])
    assert figure_of("perplexity", measured, 1)["value"] == pytest.approx(math.exp(0.5))
    assert figure_of("bits_per_byte", measured, 1)["value"] == pytest.approx(0.5 / math.log(2))


@pytest.mark.parametrize(
    ("measured", "why"),
    [
        (Measured(why="no chat template"), "no chat template"),
        (Measured([None, None]), "no row has a value"),
        (rows(1.0, math.nan), "the model gives NaN or infinite logits"),
        (rows(800.0), "it is above e^700"),
    ],
)
def test_what_cannot_be_computed_says_why(measured, why):
    assert figure_of("perplexity", measured, 1) == pytest.approx(
        {"value": None, "ci": None, "n": pytest.approx(len([row for row in measured.rows if row])), "why": why}
    )
    found = compare_models("perplexity", rows(1.0), measured, 1)
    assert found["change"] is None
    assert found["why"]


def test_an_interval_covers_the_mean_as_often_as_it_says():
    import numpy as np

    random = np.random.default_rng(0)
    covered = 0
    for _ in range(200):
        low, high = figure_of("bleu-4", rows(*random.normal(5, 2, 60).tolist()), 7)["ci"]
        covered += low <= 5 <= high
    assert 180 <= covered <= 198  # 95 % of 200, give or take


@pytest.mark.parametrize("count", [2, 7, 50, 4097])
def test_an_interval_is_that_of_resamples_drawn_with_numpys_generator_and_the_seed(count):
    import numpy as np

    values = np.random.default_rng(3).gamma(2.0, 30.0, count)
    random = np.random.default_rng(7)
    means = [values[random.integers(0, count, count)].mean() for _ in range(2000)]
    found = figure_of("bleu-4", rows(*values.tolist()), 7)
    assert found["ci"] == pytest.approx(np.quantile(means, [0.025, 0.975]).tolist(), rel=1e-12)


def test_the_bootstrap_looks_at_one_resample_at_a_time():
    import tracemalloc

    measured = rows(*map(float, range(20_000)))
    figure_of("bleu-4", rows(1.0, 2.0), 7)  # imports numpy
    tracemalloc.start()
    figure_of("bleu-4", measured, 7)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 6e6  # bytes; indices and values of fifty resamples at once took 25 MB


def test_models_are_compared_on_the_same_rows():
    hard, easy = [3.0, 1.0, 2.0, 4.0] * 10, [2.9, 0.9, 1.9, 3.9] * 10
    found = compare_models("perplexity", rows(*easy), rows(*hard), 1)
    assert found["change"] == pytest.approx(math.exp(-0.1))
    assert found["ci"] == pytest.approx([math.exp(-0.1)] * 2)  # each row is 0.1 better, whichever rows are drawn
    assert (found["as"], found["better"], found["test"]) == ("ratio", 1, "paired bootstrap")
    assert compare_models("perplexity", rows(*hard), rows(*easy), 1)["better"] == 0
    noise = compare_models("bleu-4", rows(*[1.0, 2.0] * 10), rows(*[2.0, 1.0] * 10), 1)
    assert (noise["change"], noise["better"]) == (0.0, None)
    assert compare_models("bleu-4", rows(*easy), rows(*hard), 1)["better"] == 0  # more is better


def test_accuracies_are_compared_by_mcnemar():
    right = Measured([(1.0, 1.0)] * 9 + [(0.0, 1.0)])
    wrong = Measured([(0.0, 1.0)] * 9 + [(1.0, 1.0)])
    found = compare_models("acc", right, wrong, 1)
    assert found["p"] == pytest.approx(2 * (1 + 10) / 2**10)  # b = 9, c = 1
    assert (found["test"], found["better"]) == ("McNemar, exact", 1)
    assert compare_models("acc", right, right, 1)["p"] == 1.0


def test_mcnemar_is_the_binomial_test():
    stats = pytest.importorskip("scipy.stats")
    for first, second in ((0, 5), (3, 8), (40, 61), (7, 7)):
        pairs = [(True, False)] * first + [(False, True)] * second + [(True, True)] * 4
        assert mcnemar(pairs) == pytest.approx(stats.binomtest(first, first + second).pvalue)


def test_bleu_and_rouge_are_those_of_the_libraries():
    import jieba
    from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu
    from rouge_chinese import Rouge

    pairs = [
        ("感冒了要多喝水，注意休息。", "感冒应多喝水、多休息。"),
        ("去看医生", "发热三天以上请去看医生，不要硬扛。"),
    ]
    for answer, reference in pairs:
        smoothing = SmoothingFunction().method3
        expected = sentence_bleu([list(reference)], list(answer), smoothing_function=smoothing)
        scores = Rouge().get_scores(" ".join(jieba.cut(answer)), " ".join(jieba.cut(reference)))[0]
        assert bleu(answer, reference) == pytest.approx(100 * expected, abs=1e-4)
        assert rouge(answer, reference) == pytest.approx(
            {name: 100 * score["f"] for name, score in scores.items()}, abs=1e-4
        )
    # By hand: 4 of 5 characters, 3 of 4 pairs, 2 of 3 triples, 1 of 2 fours, no brevity penalty.
    assert bleu("一二三四六", "一二三四五") == pytest.approx(100 * (4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25, abs=1e-4)
    assert (bleu("", "一"), rouge("", "一")["rouge-l"]) == (0, 0)


@pytest.mark.parametrize(("ids", "expected"), [([1, 2, 3], None), ([1, 2, 3, 4], 0.0), ([1] * 8, 0.8)])
def test_repetition_is_the_share_of_repeated_fours(ids, expected):
    assert repetition(ids) == expected
