"""Settings that need more than this machine has, or that do less than they say: found while planning."""

import pytest
from planned import INIT

from pipeline.plan import placing


def refused(*problems):
    """What a run of `validate` that found these problems comes to."""
    count = [f"{len(problems)} problems; nothing was run"] if len(problems) > 1 else []
    return 2, "\n".join([*(f"x.yaml:{problem}" for problem in problems), *count]) + "\n"


# GPUs


@pytest.mark.parametrize(
    ("text", "place"),
    [
        (f"{INIT}  sft: {{data: consult, launch: {{processes: 4}}}}\n", "8:44"),
        (f"launch: {{processes: 4}}\n{INIT}  sft: {{data: consult}}\n", "1:21"),
    ],
)
def test_more_processes_than_gpus_are_refused(project, monkeypatch, text, place):
    monkeypatch.setattr(placing, "gpus", lambda: 2)
    why = "`processes` is 4, one for each GPU, and this machine has 2 GPUs; write `launch: {processes: 2}`"
    assert project.validate(text) == refused(f"{place}: stage `sft`: {why}")


@pytest.mark.parametrize("there", [0, 4, 8])
def test_processes_without_a_gpu_or_with_enough_of_them_are_let_through(project, monkeypatch, there):
    monkeypatch.setattr(placing, "gpus", lambda: there)
    assert project.validate(f"{INIT}  sft: {{data: consult, launch: {{processes: 4}}}}\n")[0] == 0
