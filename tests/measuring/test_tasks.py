"""Tasks of lm-evaluation-harness without a model: their names, metrics and figures."""

import pytest

from stages.measuring import tasks
from stages.measuring.metrics import figure_of


def test_the_harness_knows_the_chinese_medical_tasks():
    pytest.importorskip("lm_eval")
    known = tasks.task_names(None)
    assert {"cmmlu_anatomy", "cmmlu_traditional_chinese_medicine", "ceval-valid_physician", "cmmlu"} <= known
    assert tasks.task_metrics("cmmlu_anatomy", None) == ("acc", "acc_norm")


def test_a_figure_that_is_no_mean_of_rows_is_the_harness_own():
    measured = tasks._measured(0.7, [0.5, 0.6])
    assert figure_of("f1", measured, 1) == {"value": 0.7, "ci": None, "n": 2, "why": None}
    assert tasks._measured(0.55, [0.5, 0.6]).rows == [(0.5, 1.0), (0.6, 1.0)]
