"""What the stages of a plan take of this machine is said before anything runs."""

import json
from pathlib import Path

from pipeline.config.checker import load_config
from pipeline.plan import machine
from pipeline.plan.placing import build_plan

TEXT = "  train: {use: sft, data: consult, trainer: {learning_rate: 1e-5}}\n  merge: {model: m}\n"


def hollow(layers):
    """A weight file of `layers` weights of 400 kB in float32, which takes no room."""
    names = [f"model.layers.{number}.mlp.up_proj.weight" for number in range(layers)]
    size = 4 * 10**5
    entries = {
        name: {"dtype": "F32", "shape": [100, 1_000], "data_offsets": [size * place, size * (place + 1)]}
        for place, name in enumerate(names)
    }
    header = json.dumps(entries).encode()
    with open("m/model.safetensors", "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + size * layers)


def test_a_stage_that_takes_more_memory_than_there_is_is_noted_and_merge_takes_one_weight(project, monkeypatch):
    project.write("x.yaml", project.model() + TEXT)
    monkeypatch.setattr(machine, "gpus", lambda: 0)

    def notes(layers, memory):
        hollow(layers)
        monkeypatch.setattr(machine, "main_memory", lambda: memory)
        planned = build_plan(load_config(Path("x.yaml")), Path("saves"))
        assert {step.name: step.needs.memory for step in planned.steps}["merge"] == 2 * 4 * 10**5
        return list(machine.memory_notes(planned))

    assert notes(5, 5 * 16 * 10**5) == []
    told = "stage `train` takes at least 8.0 MB of memory, and this machine has 7.9 MB"
    assert notes(5, 79 * 10**5) == [told]
    assert notes(50, 7 * 10**5) == [
        "stage `train` takes at least 80.0 MB of memory, and this machine has 700.0 kB",
        "stage `merge` takes at least 800.0 kB of memory, and this machine has 700.0 kB",
    ]
    monkeypatch.setattr(machine, "gpus", lambda: 1)
    assert notes(50, 7 * 10**5) == []
