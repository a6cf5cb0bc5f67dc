"""Several processes share a step of the rows that the YAML says."""

import pytest

from stages.runtime.errors import StageError
from stages.training.sharing import split


@pytest.mark.parametrize(
    ("batch", "accumulation", "processes", "expected"),
    [
        (8, 1, 1, (8, 1)),
        (8, 4, 4, (8, 1)),
        (8, 4, 2, (8, 2)),
        (8, 4, 8, (4, 1)),
        (8, 1, 8, (1, 1)),
        (6, 6, 4, (3, 3)),
        (3, 4, 6, (1, 2)),
        (5, 3, 15, (1, 1)),
    ],
)
def test_accumulation_is_divided_first_and_the_rows_of_a_step_stay(batch, accumulation, processes, expected):
    assert split(batch, accumulation, processes) == expected
    assert expected[0] * expected[1] * processes == batch * accumulation


@pytest.mark.parametrize(
    ("batch", "accumulation", "processes", "said"),
    [
        (
            8,
            1,
            3,
            "3 processes cannot share the 8 rows of a step equally (`per_device_train_batch_size: 8` × "
            "`gradient_accumulation_steps: 1`); write `per_device_train_batch_size: 6` or `9`, or "
            "`launch: {processes: 2}` or `4`",
        ),
        (
            1,
            1,
            2,
            "2 processes cannot share the 1 row of a step equally (`per_device_train_batch_size: 1` × "
            "`gradient_accumulation_steps: 1`); write `per_device_train_batch_size: 2`, or `launch: {processes: 1}`",
        ),
        (
            4,
            2,
            16,
            "16 processes cannot share the 8 rows of a step equally (`per_device_train_batch_size: 4` × "
            "`gradient_accumulation_steps: 2`); write `per_device_train_batch_size: 8`, or `launch: {processes: 8}`",
        ),
    ],
)
def test_rows_that_cannot_be_shared_are_refused_with_the_nearest_that_can(batch, accumulation, processes, said):
    with pytest.raises(StageError) as refused:
        split(batch, accumulation, processes)
    assert str(refused.value) == said
