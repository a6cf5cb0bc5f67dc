"""A training stage prepares its rows, which forks, before it builds its arguments, which open the GPU."""

import json
import os
from pathlib import Path

import pytest

from stages import dpo, kto, pt, reward, sft
from stages.data.source import Source
from stages.model.inputs import Inputs
from stages.runtime.errors import StageError
from stages.training import loop, preparation

pytestmark = pytest.mark.train

DATA = Path(__file__).parents[2] / "data"
FILES = {pt: ("med_book.jsonl", "text"), sft: ("med_qa.json", "alpaca")}


@pytest.mark.parametrize("stage", [pt, sft, dpo, kto, reward], ids=lambda stage: stage.__name__)
def test_rows_are_prepared_before_the_arguments_are_built_in_the_process_of_the_stage(
    tiny, tmp_path, monkeypatch, stage
):
    real, built = loop.arguments, tmp_path / "built"

    def arguments(*given, **named):
        with open(built, "a", encoding="utf-8") as file:
            file.write(f"{os.getpid()}\n")
        return real(*given, **named)

    def prepare(*given, **named):
        raise StageError("rows are prepared now")

    monkeypatch.setattr(loop, "arguments", arguments)
    monkeypatch.setattr(preparation, "prepare", prepare)
    name, form = FILES.get(stage, ("med_prefer.jsonl", "preference"))
    source = Source(path=str(DATA / name), format=form, max_samples=4)
    if stage is kto:
        rows = [{"prompt": "a", "completion": "b", "label": True}, {"prompt": "a", "completion": "c", "label": False}]
        file = tmp_path / "labelled.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        source = Source(path=str(file), format="labelled")
    config = stage.Config(model="base", data=[source], lora={"r": 2})
    with pytest.raises(StageError, match=r"^rows are prepared now$"):
        stage.run(config, Inputs(model=[str(tiny("llama"))]), tmp_path)
    tried = built.read_text(encoding="utf-8").split()
    assert tried
    assert str(os.getpid()) not in tried


@pytest.mark.parametrize(
    ("trainer", "told"),
    [
        ({"dataloader_prefetch_factor": 2}, "SFTConfig refuses these settings: --dataloader_prefetch_factor can only"),
        ({"optim": "sgd", "optim_args": "momentum=x"}, "the optimizer or its schedule refuses `optim`, `optim_args` "),
    ],
)
def test_what_a_library_refuses_is_known_before_rows_are_prepared(tiny, rows, tmp_path, monkeypatch, trainer, told):
    monkeypatch.setattr(preparation, "prepare", lambda *given, **named: pytest.fail("rows were prepared first"))
    config = sft.Config(model="base", data=[rows("alpaca", 2)], lora={"r": 2}, trainer=trainer)
    with pytest.raises(StageError) as caught:
        sft.run(config, Inputs(model=[str(tiny("llama"))]), tmp_path)
    assert str(caught.value).startswith(told)


@pytest.mark.parametrize("settings", [{"packing": True, "max_length": 99}, {"per_device_train_batch_size": 3}])
def test_rows_are_prepared_with_the_settings_that_the_trainer_gets(rows, tmp_path, settings):
    config = sft.Config(model="base", data=[rows("alpaca", 2)], seed=7, trainer={**settings, "save_total_limit": 1})
    first = loop.row_settings("SFTConfig", config, packing_strategy="bfd_split")
    then = loop.arguments("SFTConfig", config, tmp_path, packing_strategy="bfd_split")
    names = ("max_length", "packing", "packing_strategy", "eval_packing", "shuffle_dataset", "seed", "dataset_num_proc")
    for name in (*names, "per_device_train_batch_size"):
        assert getattr(first, name) == getattr(then, name), name
