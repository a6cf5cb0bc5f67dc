"""Gradient checkpointing is left out where the layers surely fit, and the weights stay the same."""

from typing import Any

import pytest

from stages.training import checkpointing
from stages.training.settings import TrainingConfig

LLAMA_7B = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}
TINY = {"hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 2, "num_attention_heads": 4}
GB = 10**9


def config(**trainer: Any) -> TrainingConfig:
    return TrainingConfig.model_validate(
        {"model": "x", "data": [{"path": "x.jsonl", "format": "text"}], "trainer": trainer}
    )


@pytest.mark.parametrize(
    ("model", "memory", "off"),
    [
        (TINY, 24 * GB, True),
        (LLAMA_7B, 80 * GB, False),
        (LLAMA_7B, 10_000 * GB, True),
        ({}, 24 * GB, False),  # a shape that is not known
        ({"text_config": TINY}, 24 * GB, True),
        ({"n_embd": 64, "n_layer": 2, "n_head": 4}, 24 * GB, True),
    ],
)
def test_it_is_left_out_only_where_the_layers_surely_fit(model: dict[str, Any], memory: int, off: bool) -> None:
    assert (config().room_for_layers(model, memory) is not None) is off


@pytest.mark.parametrize(
    "trainer",
    [
        {"gradient_checkpointing": True},
        {"gradient_checkpointing": False},
        {"gradient_checkpointing_kwargs": {"use_reentrant": False}},
        {"activation_checkpointing": True},
        {"activation_offloading": True},
        {"max_length": None},  # nothing limits a row
    ],
)
def test_what_the_user_chose_stays(trainer: dict[str, Any]) -> None:
    assert config(**trainer).room_for_layers(TINY, 24 * GB) is None


def test_longer_rows_and_larger_batches_bring_it_back() -> None:
    memory = 8 * checkpointing.kept_by_layers(TINY, 8 * 1024, 1024)  # of the defaults
    assert config().room_for_layers(TINY, memory)
    assert not config(per_device_train_batch_size=9).room_for_layers(TINY, memory)
    assert not config(max_length=1100).room_for_layers(TINY, memory)


def test_each_expert_that_a_token_is_sent_to_counts() -> None:
    one = checkpointing.kept_by_layers({**TINY, "moe_intermediate_size": 100}, 1024, 1024)
    four = checkpointing.kept_by_layers({**TINY, "moe_intermediate_size": 100, "num_experts_per_tok": 4}, 1024, 1024)
    assert one < four
