"""Settings written into a YAML file leave everything else as it is."""

import pytest

from pipeline.config.document import parse
from pipeline.config.editing import with_settings
from pipeline.errors import ConfigError

FLOW = """\
# top
stages:
  sft: {data: consult, trainer: {max_length: 512}}   # one line
  dpo: {data: prefer}
"""
BLOCK = """\
stages:
  sft:            # the stage
    data: consult
    trainer:
      # what it takes
      max_length: 512   # tokens
      packing: false

  dpo: {data: prefer}   # the end
"""


@pytest.mark.parametrize(
    ("text", "path", "value", "line"),
    [
        (FLOW, "sft.trainer.max_length", 256, "  sft: {data: consult, trainer: {max_length: 256}}   # one line"),
        (
            FLOW,
            "sft.trainer.gradient_checkpointing",
            True,
            "  sft: {data: consult, trainer: {gradient_checkpointing: true, max_length: 512}}   # one line",
        ),
        (FLOW, "dpo.lora", {"r": 16, "lora_alpha": 32}, "  dpo: {lora: {r: 16, lora_alpha: 32}, data: prefer}"),
        (FLOW, "dpo.trainer.optim", "adamw_8bit", "  dpo: {trainer: {optim: adamw_8bit}, data: prefer}"),
        (FLOW, "dpo.trainer.optim", "no_", "  dpo: {trainer: {optim: no_}, data: prefer}"),
        (FLOW, "dpo.template", "true", '  dpo: {template: "true", data: prefer}'),
        (BLOCK, "sft.trainer.max_length", 256, "      max_length: 256   # tokens"),
        (BLOCK, "sft.trainer.packing", True, "      packing: true"),
    ],
)
def test_one_line_changes_and_the_rest_stays(text, path, value, line):
    changed = with_settings(text, "x.yaml", {("stages", *path.split(".")): value}).splitlines()
    assert line in changed
    others = [one for one in text.splitlines() if one not in changed]
    assert len(changed) == len(text.splitlines())
    assert len(others) == 1


def test_a_new_key_of_a_block_goes_before_the_first_one_and_comments_stay():
    changed = with_settings(BLOCK, "x.yaml", {("stages", "sft", "trainer", "gradient_checkpointing"): True})
    assert changed == BLOCK.replace(
        "      max_length: 512   # tokens\n", "      gradient_checkpointing: true\n      max_length: 512   # tokens\n"
    )


def test_a_new_line_ends_as_the_lines_of_the_file_end():
    changed = with_settings(
        BLOCK.replace("\n", "\r\n"), "x.yaml", {("stages", "sft", "trainer", "packing_strategy"): "bfd"}
    )
    new = "      packing_strategy: bfd\n      max_length: 512   # tokens\n"
    assert changed == BLOCK.replace("      max_length: 512   # tokens\n", new).replace("\n", "\r\n")


@pytest.mark.parametrize(
    ("empty", "line"),
    [
        ("    trainer:\n", "    trainer: {optim: sgd}\n"),
        ("    trainer:   # none yet\n", "    trainer: {optim: sgd}   # none yet\n"),
        ("    trainer: ~\n", "    trainer: {optim: sgd}\n"),
        ("    trainer:", "    trainer: {optim: sgd}"),
    ],
)
def test_a_key_with_nothing_behind_it_gets_a_value(empty, line):
    text = "stages:\n  sft:\n    data: consult\n" + empty
    changed = with_settings(text, "x.yaml", {("stages", "sft", "trainer", "optim"): "sgd"})
    assert changed == text.replace(empty, line)


def test_a_key_of_a_flow_mapping_with_nothing_behind_it_gets_a_value():
    text = "stages: {sft: {data: consult, trainer: , lora:}}\n"
    keys = {("stages", "sft", "trainer", "optim"): "sgd", ("stages", "sft", "lora", "r"): 8}
    changed = with_settings(text, "x.yaml", keys)
    assert changed == "stages: {sft: {data: consult, trainer: {optim: sgd} , lora: {r: 8}}}\n"


def test_a_whole_mapping_is_replaced_with_what_is_in_it():
    changed = with_settings(BLOCK, "x.yaml", {("stages", "sft", "trainer"): {"packing": True}})
    assert parse(changed, "x.yaml").data["stages"]["sft"]["trainer"] == {"packing": True}
    assert changed.endswith("\n\n  dpo: {data: prefer}   # the end\n")


def test_several_settings_are_written_together():
    keys = {("stages", "sft", "trainer", "a"): 1, ("stages", "sft", "trainer", "b"): 2, ("stages", "dpo", "launch"): {}}
    found = parse(with_settings(BLOCK, "x.yaml", keys), "x.yaml").data["stages"]
    assert found["sft"]["trainer"] == {"a": 1, "b": 2, "max_length": 512, "packing": False}
    assert found["dpo"] == {"launch": {}, "data": "prefer"}


SHARED = """\
x-shared: &usual {max_length: 512}
stages:
  sft: {data: consult, trainer: *usual}
  dpo: {data: prefer, trainer: {<<: *usual, beta: 0.1}}
"""


def test_a_part_that_stages_share_is_not_changed_and_a_merged_mapping_gets_a_key_of_its_own():
    with pytest.raises(ConfigError) as error:
        with_settings(SHARED, "x.yaml", {("stages", "sft", "trainer", "max_length"): 256})
    text = "x.yaml: `stages.sft.trainer.max_length` is in a part that the file shares; write it yourself"
    assert error.value.problems == [text]
    changed = with_settings(SHARED, "x.yaml", {("stages", "dpo", "trainer", "max_length"): 256})
    assert "trainer: {max_length: 256, <<: *usual, beta: 0.1}" in changed
