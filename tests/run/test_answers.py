"""The final question is answered by a base that has no chat template of its own, too."""

import pytest

from pipeline.run.answers import _in_child
from stages.chat.template import template_text

pytestmark = pytest.mark.train


def test_a_base_without_a_template_answers_with_that_of_the_run(tiny, tmp_path):
    models = {"the first model": [str(tiny("llama", template=None))], "after sft": [str(tiny("llama"))]}
    answers = _in_child(models, "感冒了怎么办？", template_text("med"), tmp_path)
    assert answers.keys() == models.keys(), (tmp_path / "log.txt").read_text(encoding="utf-8")
    assert answers["the first model"] == answers["after sft"]  # the same weights
