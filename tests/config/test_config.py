"""A YAML file in, every mistake in it out: at once, in line order, each one sentence."""

from pathlib import Path

import pytest
from planned import INIT as TOP

from pipeline.config.checker import load_config


@pytest.fixture
def project(project):
    """Writes `x.yaml` beside small data files; the exit code of `validate` and what it printed."""
    return project.validate


def refused(*problems):
    """What a run of `validate` that found these problems comes to."""
    count = [f"{len(problems)} problems; nothing was run"] if len(problems) > 1 else []
    return 2, "\n".join([*problems, *count]) + "\n"


def test_a_config_without_a_mistake_says_what_it_would_run(project):
    text = TOP + "  pt: {data: books}\n  sft: {data: [consult]}\n  merge:\n"
    assert project(text) == (
        0,
        "x.yaml: 4 stages (init → pt → sft → merge); books 2 rows, consult 1 rows; no problem found\n",
    )


def test_all_mistakes_are_reported_at_once_in_the_order_of_the_file(project):
    text = """\
template: medd
modell: m
data:
  books: {path: books.jsonl, format: text}
  consult: {path: consult.jsonl, format: alpaca}
stages:
  init: {architecture: bloom, data: books, hiden_size: 64}
  pt:
    data: book
    lora: {loraalpha: 16}
    trainer: {learning_rate: fast, packing: no}
  sftt: {data: consult}
  dpo:
    use: sft
    model: $merge
    data: consult
    trainer:
      lerning_rate: 5e-5
  merge:
"""
    assert project(text) == refused(
        "x.yaml:1:11: there is no template `medd` (a name, a .jinja or a .json file); did you mean `med`?",
        "x.yaml:2:1: there is no `modell` here; did you mean `model`?",
        "x.yaml:7:44: stage `init` has no setting `hiden_size`; did you mean `hidden_size`?",
        "x.yaml:9:11: stage `pt`: no data `book` is declared; did you mean `books`?",
        "x.yaml:10:12: stage `pt`: LoraConfig has no setting `loraalpha`; did you mean `lora_alpha`?",
        "x.yaml:11:30: stage `pt`: `learning_rate` is `fast`; SFTConfig wants a number (float)",
        "x.yaml:11:45: stage `pt`: `packing` is `no`; SFTConfig wants true or false",
        "x.yaml:12:3: there is no stage `sftt` (a second of a kind is `sftt: {use: KIND}`); did you mean `sft`?",
        "x.yaml:15:12: stage `dpo`: no stage `merge` is above it; it stands below or is the stage itself",
        "x.yaml:18:7: stage `dpo`: SFTConfig has no setting `lerning_rate`; did you mean `learning_rate`?",
    )


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("sft:", ["8:3: stage `sft` needs `data`"]),
        ("sft: 3", ["8:8: stage `sft` is `3`; its settings are a mapping"]),
        ("sft: {data: consult, lora: true}", ["8:30: stage `sft`: `lora` is `true`; it wants a mapping"]),
        ("sft: {data: consult, trainer: [1]}", ["8:33: stage `sft`: `trainer` is `[1]`; it wants a mapping"]),
        ("sft: {data: consult, seed: x}", ["8:30: stage `sft`: `seed` is `x`; it wants a whole number"]),
        ("sft: {data: consult, seed: 1.0}", ["8:30: stage `sft`: `seed` is `1.0`; it wants a whole number"]),
        (
            "sft: {data: consult, eval_size: -1}",
            ["8:35: stage `sft`: `eval_size` is `-1`; it wants a number greater than or equal to 0"],
        ),
        (
            "sft: {data: {consult: 0, consul: yes, prefer: 1}}",
            [
                "8:25: stage `sft`: the weight of `consult` is `0`; it wants a number above 0",
                "8:28: stage `sft`: no data `consul` is declared; did you mean `consult`?",
                "8:36: stage `sft`: the weight of `consul` is `yes`; it wants a number above 0",
            ],
        ),
        (
            "quantize: {calibration: {data: {consult: 3, prefer: -1}}}",
            ["8:55: stage `quantize`: the weight of `prefer` is `-1`; it wants a number above 0"],
        ),
        (
            "quantize: {calibration: {data: consult, weights: [1]}}",
            [
                "8:43: stage `quantize`: weights stand beside the names; write `data: {books: 1, general: 5}`",
            ],
        ),
        (
            "sft: {data: consult, weights: [1]}",
            ["8:24: stage `sft`: weights stand beside the names; write `data: {books: 1, general: 5}`"],
        ),
        (
            "sft: {data: consult, rows: 5}",
            ["8:3: stage `sft`: `rows` are drawn by weights; write `data: {books: 1, general: 5}`"],
        ),
        ("sft: {data: []}", ["8:15: stage `sft`: `data` is a name of declared data, or a list of names"]),
        (
            "sft: {data: [consult, consul]}",
            ["8:25: stage `sft`: no data `consul` is declared; did you mean `consult`?"],
        ),
        (
            "sft: {data: consult, eval_data: zzz}",
            ["8:35: stage `sft`: no data `zzz` is declared; there is `books`, `consult`, `prefer`"],
        ),
        (
            "dpo: {data: prefer, trainer: {loss_type: sigmod}}",
            ["8:44: stage `dpo`: `loss_type` has no choice `sigmod` of DPOConfig; did you mean `sigmoid`?"],
        ),
        (
            "pt: {data: books, trainer: {output_dir: out}}",
            [
                "8:43: stage `pt`: `output_dir` is set by the pipeline (every stage writes into its own folder); "
                "remove it"
            ],
        ),
        (
            "pt: {data: books, trainer: {max_seq_length: 512}}",
            ["8:31: stage `pt`: `max_seq_length` is not a setting of SFTConfig; it is now `max_length`"],
        ),
        (
            "merge: {shard_size: 2, verify: yes}",
            [
                "8:23: stage `merge`: `shard_size` is `2`; it wants text",
                "8:34: stage `merge`: `verify` is `yes`; it wants true or false",
            ],
        ),
        (
            "merge: {shard_size: 2 TB}",
            [
                "8:23: stage `merge`: `shard_size` is `2 TB`; it wants text that matches "
                "`^[0-9]+(\\.[0-9]+)?(MB|GB|MiB|GiB)$`"
            ],
        ),
        (
            "quantize: {desc_actt: true, sym: true, bits: 5, gptq: {damp: 1, desc_actt: true, sym: 3}, "
            "calibration: {data: consult, samples: 0, row: 2}}",
            [
                "8:14: stage `quantize` has no setting `desc_actt`; did you mean `desc_act` under `gptq:`?",
                "8:31: stage `quantize` has no setting `sym`; it belongs under `gptq:`",
                "8:48: stage `quantize`: `bits` is `5`; it wants 2, 3, 4 or 8",
                "8:58: stage `quantize`: `damp` is not a setting of GPTQConfig; it is now `damp_percent`",
                "8:67: stage `quantize`: GPTQConfig has no setting `desc_actt`; did you mean `desc_act`?",
                "8:89: stage `quantize`: `sym` is `3`; GPTQConfig wants true or false",
                "8:131: stage `quantize`: `samples` is `0`; it wants a number greater than 0",
                "8:134: stage `quantize` has no setting `row`; there is `data`, `max_length`, `samples`",
            ],
        ),
        (
            "quantize: {calibrationn: {data: consult}}",
            [
                "8:3: stage `quantize` needs `calibration`",
                "8:14: stage `quantize` has no setting `calibrationn`; did you mean `calibration`?",
            ],
        ),
        ("quantize: {calibration: {samples: 3}}", ["8:14: stage `quantize` needs `calibration.data`"]),
        (
            "sft: {data: consult, template: zzz}",
            [
                "8:34: there is no template `zzz` (a name, a .jinja or a .json file); "
                "there is `alpaca_zh`, `chatml`, `llama3`, `med`, `plain`, `qwen`"
            ],
        ),
    ],
)
def test_a_mistake_in_a_stage_names_its_place_the_word_and_what_is_wanted(project, line, expected):
    assert project(f"{TOP}  {line}\n") == refused(*(f"x.yaml:{problem}" for problem in expected))


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (
            "../x: {use: sft, data: consult}",
            "8:3: `../x` is not a valid stage name; use small letters, digits, `_` and `-`",
        ),
        (
            "/tmp/x: {use: sft, data: consult}",
            "8:3: `/tmp/x` is not a valid stage name; use small letters, digits, `_` and `-`",
        ),
        (
            "tensorboard: {use: merge}",
            "8:3: `tensorboard` is the folder of TensorBoard's curves in `saves/<config>`; give the stage another name",
        ),
        ("..: {use: merge}", "8:3: `..` is not a valid stage name; use small letters, digits, `_` and `-`"),
        ('"x\\n": {use: merge}', "8:3: `x\n` is not a valid stage name; use small letters, digits, `_` and `-`"),
        (
            f"{'x' * 65}: {{use: merge}}",
            f"8:3: `{'x' * 65}` is not a valid stage name; use small letters, digits, `_` and `-`",
        ),
        (
            "../x:",
            "8:3: there is no stage `../x` (a second of a kind is `../x: {use: KIND}`); "
            "there is `add_tokens`, `dpo`, `evaluate`, `init`, `kto`, `merge`, `pt`, `quantize`, `reward`, `select`, "
            "`sft`",
        ),
        (
            "_trainer:",
            "8:3: there is no stage `_trainer` (a second of a kind is `_trainer: {use: KIND}`); "
            "there is `add_tokens`, `dpo`, `evaluate`, `init`, `kto`, `merge`, `pt`, `quantize`, `reward`, `select`, "
            "`sft`",
        ),
        (
            "x: {use: ../x}",
            "8:12: there is no stage `../x`; "
            "there is `add_tokens`, `dpo`, `evaluate`, `init`, `kto`, `merge`, `pt`, `quantize`, `reward`, `select`, "
            "`sft`",
        ),
    ],
)
def test_a_stage_cannot_leave_the_saves_folder(project, line, expected):
    assert project(f"{TOP}  {line}\n") == refused(f"x.yaml:{expected}")


def test_the_second_stage_of_a_kind_names_its_kind(project):
    stages = "  sft: {data: consult}\n  dpo: {data: prefer}\n  dpo-hinge: {use: dpo, model: $sft, data: prefer}\n"
    code, shown = project(TOP + stages)
    assert (code, shown.splitlines()) == (
        0,
        [
            "x.yaml: 4 stages (init → sft → dpo → dpo-hinge); books 2 rows, consult 1 rows, prefer 1 rows; "
            "no problem found"
        ],
    )
    loaded = load_here()
    assert [(stage.name, stage.use, stage.start) for stage in loaded.stages] == [
        ("init", "init", None),
        ("sft", "sft", "$init"),
        ("dpo", "dpo", "$sft"),
        ("dpo-hinge", "dpo", "$sft"),
    ]


def load_here(*assignments):
    return load_config(Path("x.yaml"), assignments)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", ["x.yaml:1:1: `stages` names the stages in order, such as `sft: {data: consult}`"]),
        ("stages: [sft]\n", ["x.yaml:1:1: `stages` names the stages in order, such as `sft: {data: consult}`"]),
        (
            "seed: true\nquestion: 3\ntemplate: 3\ndata: [a]\nlaunch: 2\nstages: {merge: {model: ./m}}\n",
            [
                "x.yaml:1:7: `seed` is `true`; it wants a whole number",
                "x.yaml:2:11: `question` is `3`; it wants text",
                "x.yaml:3:11: `template` is a built-in name, a .jinja file or a prompt-template .json file",
                "x.yaml:4:7: `data` names data sets, such as `consult: {path: consult.json, format: alpaca}`",
                "x.yaml:5:9: `launch` is `2`; it wants a mapping",
            ],
        ),
        (
            "stages:\n  sft: {data: consult}\n",
            [
                "x.yaml:2:3: stage `sft` has no model to start from; set `model:` at the top, or put an `init` stage "
                "first",
                "x.yaml:2:15: stage `sft`: no data `consult` is declared; declare it at the top under `data:`",
            ],
        ),
        (
            "data:\n  My data: {path: a.jsonl, format: text}\n  b: {path: 3, format: txet, name: b}\n  c: d.jsonl\n"
            "  e: {format: text, columns: {text: 3}, encoding: klingon, max_samples: 0}\n"
            "stages: {merge: {model: ./m}}\n",
            [
                "x.yaml:2:3: `My data` is not a valid data set name; use small letters, digits, `_` and `-`",
                "x.yaml:3:13: data `b`: `path` is `3`; it wants text",
                "x.yaml:3:24: data `b`: `format` is `txet`; did you mean `text`?",
                "x.yaml:3:30: data `b` has no setting `name`",
                "x.yaml:4:6: data `c` is `d.jsonl`; it wants a mapping",
                "x.yaml:5:3: data `e` needs `path`",
                "x.yaml:5:37: data `e`: `text` is `3`; it wants text",
                "x.yaml:5:41: data `e`: there is no encoding `klingon`; try `gb18030`, `big5` or `utf-16`",
                "x.yaml:5:73: data `e`: `max_samples` is `0`; it wants a number greater than 0",
            ],
        ),
        (
            "data:\n"
            "  f: {path: a.jsonl, format: text, clean: [html, {length: {min: x}}, nonsense]}\n"
            "  g: {path: a.jsonl, format: text, max_dropped: 2, others: {}}\n"
            "  h: {path: a.jsonl, format: text, clean: [{contamination: {against: [h, gg]}}]}\n"
            "stages: {merge: {model: ./m}}\n",
            [
                "x.yaml:2:65: data `f`: `min` is `x`; it wants a whole number",
                "x.yaml:2:70: data `f`: there is no cleaning step `nonsense`; there is `contamination`, "
                "`exact_duplicates`, `html`, `language`, `length`, `near_duplicates`, `personal_data`, "
                "`repeated_lines`, `whitespace`, `width`",
                "x.yaml:3:49: data `g`: `max_dropped` is `2`; it wants a number less than or equal to 1",
                "x.yaml:3:52: data `g`: there is no setting `others`; remove it",
                "x.yaml:4:36: data `h`: `contamination` against itself drops every row",
                "x.yaml:4:36: data `h`: `contamination` names `gg`, which is not declared; did you mean `g`?",
            ],
        ),
        (
            "a: 1\nstages: {merge: {model: ./m}}\nstages:\n",
            [
                "x.yaml:1:1: there is no `a` here; there is `add_tokens`, `card`, `data`, `launch`, `model`, "
                "`question`, `seed`, `stages`, `template`",
                "x.yaml:3:1: `stages` is here twice; it is in line 2 already",
            ],
        ),
    ],
)
def test_a_mistake_at_the_top_names_its_place(project, text, expected):
    assert project(text) == refused(*expected)


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (
            "org/name",
            "8:31: `org/name` is not a folder here; for a model on the Hub pin its commit (40 hex digits), "
            "as `org/name@COMMIT`",
        ),
        (
            "org/name@main",
            "8:31: `org/name@main` is not a folder here; for a model on the Hub pin its commit (40 hex digits), "
            "as `org/name@COMMIT`",
        ),
        (
            "3",
            "8:31: `model` is `3`; it is a folder, `org/name@commit` on the Hub, `$stage`, or a list: a base, then "
            "adapters on it",
        ),
        ("$dpo", "8:31: stage `sft`: no stage `dpo` is above it; there is `init`"),
        ("$ini", "8:31: stage `sft`: no stage `ini` is above it; did you mean `init`?"),
        ("$sft", "8:31: stage `sft`: no stage `sft` is above it; it stands below or is the stage itself"),
    ],
)
def test_a_model_is_a_folder_a_pinned_hub_name_or_a_stage_above(project, model, expected):
    assert project(f"{TOP}  sft: {{data: consult, model: {model}}}\n") == refused(f"x.yaml:{expected}")


def test_a_hub_name_at_the_top_is_pinned_too(project):
    text = TOP.replace("  init: {architecture: bloom, data: books}\n", "  sft: {data: consult}\n")
    assert project("model: org/name\n" + text) == refused(
        "x.yaml:1:8: `org/name` is not a folder here; for a model on the Hub pin its commit (40 hex digits), "
        "as `org/name@COMMIT`"
    )


def test_only_training_stages_run_in_several_processes(project):
    text = TOP + "  sft: {data: consult, launch: {processes: 0}}\n  merge: {launch: {processes: 2}}\n"
    assert project("launch: {process: 2}\n" + text) == refused(
        "x.yaml:1:10: `launch` has no setting `process`; did you mean `processes`?",
        "x.yaml:9:44: stage `sft`: `launch`: `processes` is `0`; it wants a number greater than or equal to 1",
        "x.yaml:10:11: stage `merge`: `merge` runs in one process; remove `launch`",
    )
    text = TOP + "  sft: {data: consult}\n  dpo: {data: prefer, launch: {processes: 1}}\n  merge:\n"
    assert project("launch: {processes: 2}\n" + text)[0] == 0
    processes = {stage.name: stage.launch.processes for stage in load_here().stages}
    assert processes == {"init": 1, "sft": 2, "dpo": 1, "merge": 1}


@pytest.mark.parametrize(
    ("launch", "said"),
    [
        ("{strategy: zero4}", "1:20: `launch`: `strategy` is `zero4`; did you mean `zero3`?"),
        (
            "{processes: 2, offload: optimizer}",
            "1:24: `launch`: `offload: optimizer` needs another strategy than `ddp`; set `strategy: zero2`",
        ),
        (
            "{processes: 2, strategy: zero2, offload: parameters}",
            "1:41: `launch`: `zero2` can offload the optimizer alone; write `offload: optimizer` or `strategy: zero3`",
        ),
        (
            "{processes: 2, strategy: fsdp2, offload: optimizer}",
            "1:41: `launch`: `fsdp2` offloads weights and optimizer together; write `offload: parameters`",
        ),
        (
            "{strategy: zero3}",
            "1:1: `launch`: `zero3` divides the training between processes, and there is one; set `processes: 2` or "
            "more, or add `offload`",
        ),
        (
            "{machines: 2, rank: 2}",
            "1:23: `launch`: `rank` is `2`; with 2 machines it is `env` or a number from 0 to 1",
        ),
        (
            "{machines: 2, rendezvous: node0}",
            "1:23: `launch`: `rendezvous` is `node0`; it wants HOST:PORT of machine 0, such as `10.0.0.1:29500`, or "
            "`env`",
        ),
        (
            "{machines: 2, timeout: 10}",
            "1:23: `launch`: `timeout` is `10`; it wants a number of seconds, minutes or hours, such as `10m`",
        ),
        ("{timeout: 1h}", "1:10: `launch`: `timeout` is for several machines; set `machines`, or remove `timeout`"),
        (
            "{processes: 2, sp_size: 2}",
            "1:24: `launch`: `sp_size` divides a sequence between processes, which is not supported; remove it, and "
            "lower `trainer.max_length` if memory runs out",
        ),
    ],
)
def test_a_launch_that_means_nothing_is_refused(project, launch, said):
    assert project(f"launch: {launch}\n{TOP}  sft: {{data: consult}}\n") == refused(f"x.yaml:{said}")


def test_seed_and_template_at_the_top_hold_for_every_stage_that_does_not_say_otherwise(project):
    stages = "  pt: {data: books}\n  sft: {data: consult, seed: 3, template: chatml}\n  merge:\n"
    assert project("seed: 7\n" + TOP + stages)[0] == 0
    configs = {stage.name: stage.config for stage in load_here().stages}
    assert {name: config.seed for name, config in configs.items() if name != "merge"} == {"init": 7, "pt": 7, "sft": 3}
    assert configs["pt"].template == configs["init"].template
    assert "### 问题" in configs["pt"].template
    assert "<|im_start|>" in configs["sft"].template


def test_what_is_assigned_on_the_command_line_is_checked_like_the_file(project):
    text = TOP + "  sft: {data: consult}\n"
    words = ["sft.trainer.lerning_rate=1", "sft.seed=x", "dop.data=prefer", "stages.dpo.data=prefer"]
    assert project(text, *(word for value in words for word in ("--set", value))) == refused(
        "--set dop.data: there is no `dop` here; there is `add_tokens`, `card`, `data`, `launch`, `model`, `question`, "
        "`seed`, `stages`, `template`",
        "--set sft.trainer.lerning_rate: stage `sft`: SFTConfig has no setting `lerning_rate`; did you mean "
        "`learning_rate`?",
        "--set sft.seed: stage `sft`: `seed` is `x`; it wants a whole number",
    )


def test_two_configs_with_chinese_names_have_two_names(project):
    project(TOP)
    names = []
    for file in ("医疗.yaml", "法律.yaml", "my model v1.0.yaml"):
        Path(file).write_text(TOP, encoding="utf-8")
        names.append(load_config(Path(file)).name)
    assert names == ["医疗", "法律", "my_model_v1.0"]


def test_a_setting_of_a_library_or_of_another_tool_is_sent_to_its_place(project):
    written = "cutoff_len: 512, learning_rate: 1e-4, r: 8, lora_rank: 8, val_size: 0.1"
    assert project(f"{TOP}  sft: {{data: consult, {written}}}\n") == refused(
        "x.yaml:8:24: stage `sft` has no setting `cutoff_len`; it is now `max_length` under `trainer:`",
        "x.yaml:8:41: stage `sft` has no setting `learning_rate`; it belongs under `trainer:`",
        "x.yaml:8:62: stage `sft` has no setting `r`; it belongs under `lora:`",
        "x.yaml:8:68: stage `sft` has no setting `lora_rank`; it is now `lora: {r: …}`",
        "x.yaml:8:82: stage `sft` has no setting `val_size`; it is now the stage's `eval_size`",
    )


# What other programs read


def test_keys_for_anchors_are_read_and_checked_where_they_are_used(project):
    text = "x-trainer: &trainer {learning_rate: 2e-4, max_steps: 3}\n" + TOP
    assert project(text + "  sft: {data: consult, trainer: {<<: *trainer, max_steps: 5}}\n")[0] == 0
    wrong = text.replace("learning_rate", "lerning_rate") + "  sft: {data: consult, trainer: {<<: *trainer}}\n"
    told = "x.yaml:1:22: stage `sft`: SFTConfig has no setting `lerning_rate`; did you mean `learning_rate`?"
    assert project(wrong) == refused(told)


@pytest.mark.parametrize(
    ("line", "place", "word", "path"),
    [
        ("  sft: {data: consult, trainer: {run_name: '${RUN}-1'}}", "8:44", "${RUN}", "sft.trainer.run_name"),
        ("  sft: {data: consult, template: '${oc.env:X}'}", "8:34", "${oc.env:X}", "sft.template"),
    ],
)
def test_a_variable_of_the_environment_is_not_replaced(project, monkeypatch, line, place, word, path):
    monkeypatch.setenv("RUN", "canary")
    _, told = project(f"{TOP}{line}\n")
    why = f"`{word}` is not replaced, because the file says all that runs"
    assert f"x.yaml:{place}: {why}; write the value, or give it with `--set {path}=…`\n" in told
    assert "canary" not in told


@pytest.mark.parametrize(
    ("text", "program"),
    [
        ("model_name_or_path: a/b\nstage: sft\nfinetuning_type: lora\ndataset: x\ndo_train: true\n", "LLaMA-Factory"),
        ("base_model: a/b\nsequence_len: 512\ndatasets: [{path: x, type: alpaca}]\n", "Axolotl"),
        ("model_name_or_path: a/b\ndataset_name: x\nuse_peft: true\n", "TRL or alignment-handbook"),
    ],
)
def test_a_config_of_another_program_is_recognised_in_one_sentence(project, text, program):
    way = "`pipeline convert x.yaml` writes it as a config of this program"
    assert project(text) == refused(f"x.yaml: this is a config of {program}; {way}")


def test_a_run_has_one_group_of_machines(project):
    text = (
        "launch: {machines: 2}\n" + TOP + "  a: {use: sft, data: consult}\n  b: {use: sft, data: consult, launch: {}}\n"
    )
    assert project(text)[0] == 0  # each stage uses all machines, or one
    told = (
        "x.yaml:10:41: stage `b`: `machines` is `3`, and `2` for `a`; "
        "the machines of a run meet once, so write the same for all stages that they train"
    )
    assert project(text.replace("launch: {}", "launch: {machines: 3}")) == refused(told)
