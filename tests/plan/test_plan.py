"""What can be known before anything is spent: mistakes in data and models, what will run, and why."""

import dataclasses
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from planned import CHAIN, INIT, ROWS, STAGES, pretend

from pipeline.cli import main
from pipeline.config.checker import load_config
from pipeline.config.pipeline import folder_name
from pipeline.errors import ConfigError, StageFailed
from pipeline.plan import fingerprint, placing
from pipeline.plan import step as step_module
from pipeline.plan.fingerprint import installed_versions
from pipeline.plan.placing import build_plan
from pipeline.plan.step import Plan, check_unchanged, refuse_plan
from pipeline.run import runner
from pipeline.saves import artifact
from stages import dpo
from stages.runtime.hashes import Hashes
from stages.training.checkpoint import seal


def refused(*problems):
    """What a run of `validate` that found these problems comes to."""
    count = [f"{len(problems)} problems; nothing was run"] if len(problems) > 1 else []
    return 2, "\n".join([*problems, *count]) + "\n"


# Settings that fit the libraries, but not the model or the data


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (
            "pt: {data: books, lora: {target_modules: [q_proj, dense]}}",
            [
                "8:44: stage `pt`: `q_proj` matches no linear layer of the model that `init` makes; it has "
                "`dense`, `dense_4h_to_h`, `dense_h_to_4h`, `query_key_value`"
            ],
        ),
        (
            "pt: {data: books, lora: {lora_dropout: 2}}",
            ["8:42: stage `pt`: `lora_dropout` is 2; it is a share: at least 0 and below 1"],
        ),
        (
            "pt: {data: books, lora: {target_modules: '.*(q|v)_proj'}}",
            [
                "8:44: stage `pt`: `.*(q|v)_proj` matches no linear layer of the model that `init` makes; it has "
                "`dense`, `dense_4h_to_h`, `dense_h_to_4h`, `query_key_value`"
            ],
        ),
        (
            "pt: {data: books, lora: {target_modules: '.*(q|v', exclude_modules: '*head', rank_pattern: {'(': 4}}}",
            [
                "8:44: stage `pt`: `.*(q|v` is no regular expression (missing ), unterminated subpattern at "
                "position 2); text is read as one, so mend it or give a list of names",
                "8:71: stage `pt`: `*head` is no regular expression (nothing to repeat at position 0); text is read as "
                "one, so mend it or give a list of names",
                "8:94: stage `pt`: `(` is no regular expression (missing ), unterminated subpattern at position 0); "
                "mend it",
            ],
        ),
        *[
            (
                f"dpo: {{data: prefer, trainer: {{train_sampling_strategy: {order}}}}}",
                [
                    f"8:58: stage `dpo`: `{order}` goes by the length of a row, which TRL does not know of pairs; "
                    "leave it out, or write `sequential` to keep the order of the file"
                ],
            )
            for order in ("group_by_length", "batch_rebalance")
        ],
        (
            "sft: {data: consult, trainer: {packing: true, packing_strategy: wrapped}}",
            ["8:67: stage `sft`: `wrapped` lets rows attend to each other; remove it, and packed rows stay apart"],
        ),
        (
            "pt: {data: books, trainer: {packing_strategy: bfd}}",
            [
                "8:49: stage `pt`: `bfd` cuts off what is longer than `max_length`; `bfd_split` and `wrapped` lose "
                "no token"
            ],
        ),
        (
            "pt: {data: books, trainer: {eval_strategy: epoch, packing_strategy: bfd}}",
            [
                "8:46: stage `pt`: evaluation needs held-out rows; add `eval_size: 0.05` or `eval_data: NAME`",
                "8:71: stage `pt`: `bfd` cuts off what is longer than `max_length`; `bfd_split` and `wrapped` lose "
                "no token",
            ],
        ),
        (
            "pt: {data: books, eval_size: 1, early_stopping: 3}",
            [
                "8:51: stage `pt`: it counts evaluations; add `eval_strategy: steps` and `eval_steps: 50` to `trainer`",
                "8:51: stage `pt`: the last model would be kept, which is not the best; add "
                "`load_best_model_at_end: true` to `trainer`",
            ],
        ),
        (
            "pt: {data: books, eval_size: 1, trainer: {eval_strategy: steps, load_best_model_at_end: true, "
            "save_steps: 25, metric_for_best_model: eval_los}}",
            [
                "8:109: stage `pt`: 25 is no multiple of `eval_steps`, 10, as `load_best_model_at_end` needs; write "
                "10, or leave it out",
                "8:136: stage `pt`: `eval_los` is not measured here; did you mean `loss`?",
            ],
        ),
        (
            "pt: {data: books, eval_size: 1, early_stopping: 2, trainer: {eval_strategy: epoch, save_strategy: steps, "
            "load_best_model_at_end: true, metric_for_best_model: rewards/margins}}",
            [
                "8:101: stage `pt`: `save_strategy` is `steps`, and with `load_best_model_at_end` it saves when it "
                "evaluates; write `epoch`, or leave it out",
                "8:161: stage `pt`: `rewards/margins` is not measured here; there is `aux_loss`, `entropy`, `loss`, "
                "`mean_token_accuracy`",
            ],
        ),
        (
            "pt: {data: consult}\n  sft: {data: [prefer, consult]}\n  dpo: {data: books}",
            [
                "8:14: stage `pt`: `consult.jsonl` has format `alpaca`; this stage reads `text`",
                "9:15: stage `sft`: `prefer.jsonl` has format `preference`; this stage reads `alpaca`, "
                "`prompt_completion`, `messages`, `sharegpt`",
                "10:15: stage `dpo`: `books.jsonl` has format `text`; this stage reads `preference`",
            ],
        ),
        (
            "dpo: {data: prefer, lora: {r: 8, init_lora_weights: false}, trainer: {neftune_noise_alpha: 5}}",
            [
                "8:55: stage `dpo`: `false` starts from a random adapter, so the model would not be its reference at "
                "step 0; remove it",
                "8:94: stage `dpo`: with `lora` the noise would be in the reference too, which is the same model; "
                "remove it",
            ],
        ),
        (
            "sft: {data: consult, lora: {r: 8}}\n  quantize: {calibration: {data: consult}}",
            ["9:3: stage `quantize`: an adapter cannot be quantized; put a `merge` stage above"],
        ),
        (
            "quantize: {calibration: {data: consult}, gptq: {lm_head: true}, group_size: 1024}",
            [
                "8:60: stage `quantize`: plain transformers cannot load a model with `lm_head`; remove it",
                "8:79: stage `quantize`: 1024 does not divide the 128 inputs of "
                "`transformer.h.0.self_attention.query_key_value` and of 7 more, and vLLM needs that; "
                "set `group_size: 128`",
            ],
        ),
    ],
)
def test_a_setting_that_does_not_fit_model_or_data_is_refused_with_the_reason(project, lines, expected):
    assert project.validate(f"{INIT}  {lines}\n") == refused(*(f"x.yaml:{problem}" for problem in expected))


def test_a_setting_that_fits_is_not_refused(project):
    text = project.model() + (
        "  pt: {data: books, trainer: {packing: true, packing_strategy: bfd_split}}\n"
        "  sft: {data: consult, lora: {target_modules: '.*(q|v)_proj'}, trainer: {packing: true}}\n"
    )
    assert project.validate(text) == (
        0,
        "x.yaml: 2 stages (pt → sft); books 2 rows, consult 1 rows; no problem found\n",
    )


def test_rows_are_packed_only_where_it_is_known_that_they_stay_apart(project):
    text = project.model(model_type="gpt2")
    problem = (
        "packing is not verified for `gpt2`: packed rows might attend to each other (it is verified for `bloom`, "
        "`llama`, `qwen2`, `qwen3`); set `packing: false`"
    )
    packed = "  pt: {data: books}\n  sft: {data: consult, trainer: {packing: true}}\n"
    assert project.validate(text + packed) == refused(
        f"x.yaml:8:3: stage `pt`: {problem}, or `packing_strategy: wrapped`, which lets them",
        f"x.yaml:9:43: stage `sft`: {problem}",
    )
    apart = "  pt: {data: books, trainer: {packing_strategy: wrapped}}\n  sft: {data: consult}\n"
    assert project.validate(text + apart)[0] == 0


# Model folders


CHOOSE = "or choose `med`, `alpaca_zh` or `plain`, which end a turn with the model's own eos_token"
SFT = "  sft: {data: consult}\n"


def test_a_template_whose_marks_the_tokenizer_does_not_know_is_refused(project):
    text = project.model().replace("template: med", "template: chatml")
    assert project.validate(text + SFT + "  dpo: {data: prefer, template: llama3}\n") == refused(
        "x.yaml:2:11: stage `sft`: the template writes `<|im_end|>`, `<|im_start|>`, which the tokenizer of `m` does "
        'not know as one token; write `add_tokens: ["<|im_end|>", "<|im_start|>"]` at the top, ' + CHOOSE,
        "x.yaml:9:33: stage `dpo`: the template writes `<|end_header_id|>`, `<|eot_id|>`, `<|start_header_id|>`, which "
        "the tokenizer of the model of `sft` does not know as one token; write "
        '`add_tokens: ["<|end_header_id|>", "<|eot_id|>", "<|start_header_id|>"]` at the top, ' + CHOOSE,
    )


def test_a_model_without_a_chat_template_needs_one_for_chat_stages_only(project):
    text = project.model().replace("template: med\n", "")
    assert project.validate(text + "  pt: {data: books}\n")[0] == 0
    assert project.validate(text + SFT) == refused(
        "x.yaml:7:8: stage `sft`: `m` has no chat template; set `template:` at the top to one of `alpaca_zh`, "
        "`chatml`, `llama3`, `med`, `plain`, `qwen`, or a file"
    )


def test_a_file_that_is_read_in_another_way_is_other_data(project):
    """JSON lines under the name of a text are trained on as they stand."""
    before = project.plan()
    project.write("books.txt", ROWS["books.jsonl"])
    after = project.plan(CHAIN.replace("books.jsonl", "books.txt"))
    assert [name for name in before if before[name].fingerprint != after[name].fingerprint] == STAGES
    assert ROWS["books.jsonl"].count("\n") == 2
    assert build_plan(load_config(Path("x.yaml")), Path("saves")).rows["books"] == 1


def test_the_name_of_data_that_cleaning_compares_with_changes_nothing(project):
    text = CHAIN.replace(
        "consult.jsonl, format: alpaca}",
        "consult.jsonl, format: alpaca, clean: [{contamination: {against: [books]}}]}",
    )
    before = project.plan(text)
    after = project.plan(
        text.replace("books:", "exam:").replace("[books]", "[exam]").replace("data: books", "data: exam")
    )
    assert [step.fingerprint for step in before.values()] == [step.fingerprint for step in after.values()]
    project.write("books.jsonl", ROWS["books.jsonl"].replace('"a"', '"c"'))
    assert before["dpo"].fingerprint != project.plan(text)["dpo"].fingerprint


def test_logging_counts_where_it_decides_when_to_evaluate(project):
    follows = "{load_best_model_at_end: true, eval_strategy: steps, save_steps: 20, logging_steps: 10}"
    text = CHAIN.replace("{learning_rate: 5e-5, logging_steps: 10}", follows).replace(
        "    data: consult\n", "    data: consult\n    eval_data: consult\n"
    )
    before, after = project.plan(text), project.plan(text.replace("logging_steps: 10", "logging_steps: 20"))
    assert before["sft"].fingerprint != after["sft"].fingerprint


def test_a_model_s_own_template_is_checked_too(project):
    text = project.model(template="<|user|>{{ messages }}").replace("template: med\n", "")
    assert project.validate(text + SFT) == refused(
        "x.yaml:7:3: stage `sft`: the template writes `<|user|>`, which the tokenizer of `m` does not know as one "
        'token; write `add_tokens: ["<|user|>"]` at the top, ' + CHOOSE
    )


def test_a_quantized_model_is_not_trained(project):
    text = project.model(quantization_config={"bits": 4}) + SFT
    assert project.validate(text) == refused(
        "x.yaml:1:8: stage `sft`: `m` is quantized already and cannot be trained; start from the model before"
    )


def no_folder(folder):
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()


def no_weights(folder):
    (folder / "model.safetensors").unlink()


def pickle(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def cut_off(folder):
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:-1])


def pointer(folder):
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1\n")


def no_config(folder):
    (folder / "config.json").unlink()


def torn_config(folder):
    (folder / "config.json").write_text("{\n")


def no_tokenizer(folder):
    (folder / "tokenizer.json").unlink()


def no_tokenizer_config(folder):
    (folder / "tokenizer_config.json").unlink()


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (no_folder, "the model folder `m` does not exist; name a folder or a Hub model as `org/name@commit`"),
        (
            no_weights,
            "the model folder `m` has no .safetensors weights; convert it with `save_pretrained`",
        ),
        (
            pickle,
            "the model folder `m` has no .safetensors weights (`pytorch_model.bin` is a pickle, which can run "
            "code); convert it with `save_pretrained`",
        ),
        (cut_off, "`m/model.safetensors` is cut off: 173 bytes of 174; fetch it again"),
        (pointer, "`m/model.safetensors` is a Git LFS pointer, not the file; run `git lfs pull` in its folder"),
        (no_config, "the model folder `m` has no config.json; it is not a transformers model"),
        (
            torn_config,
            "`m/config.json` cannot be read (Expecting property name enclosed in double quotes: line 2 column 1 "
            "(char 2))",
        ),
        (
            no_tokenizer,
            "the model folder `m` has no tokenizer.json; save its fast tokenizer beside the weights",
        ),
        (no_tokenizer_config, "the model folder `m` has no tokenizer_config.json"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_model_folder_that_cannot_be_used_is_refused_once(project, damage, expected):
    text = project.model() + SFT + "  dpo: {data: prefer}\n  merge:\n"
    damage(project.folder / "m")
    assert project.validate(text) == refused(f"x.yaml:1:8: stage `sft`: {expected}")


@pytest.mark.parametrize(("model_type", "native"), [("llama", True), ("xlm-roberta", True), ("my_own", False)])
def test_a_model_that_brings_its_own_code_is_used_without_it_or_not_at_all(project, model_type, native):
    text = project.model(model_type=model_type, template="x", auto_map={"AutoModel": "mine.Model"}) + "  merge:\n"
    expected = (
        "x.yaml:1:8: stage `merge`: the model folder `m` contains its own code, and transformers has no `my_own`; "
        "code from models is never run, so use a model that transformers supports"
    )
    code, shown = project.validate(text)
    assert (code, shown) == ((0, shown) if native else refused(expected))


def test_when_to_save_counts_when_the_best_checkpoint_is_taken(project):
    best = "{learning_rate: 5e-5, load_best_model_at_end: true, eval_strategy: steps, eval_steps: 5, save_steps: 5}"
    text = CHAIN.replace("{learning_rate: 5e-5, logging_steps: 10}", best).replace(
        "    data: consult\n", "    data: consult\n    eval_data: consult\n"
    )
    before = project.plan(text)
    after = project.plan(text.replace("save_steps: 5", "save_steps: 10"))
    changed = [name for name in before if before[name].fingerprint != after[name].fingerprint]
    assert changed == ["sft", "dpo", "merge", "quantize"]


def test_a_hub_model_that_is_not_here_is_noted_once_and_not_fetched(project):
    model = "model: no-such-org/no-such-model@0123456789abcdef0123456789abcdef01234567"
    text = project.model().replace("model: m", model) + f"{SFT}  another: {{use: sft, data: consult, {model}}}\n"
    assert project.validate(text) == (
        0,
        "note: `no-such-org/no-such-model@0123456789abcdef0123456789abcdef01234567` is not on this machine; `run` "
        "fetches it, until then it is unchecked\nx.yaml: 2 stages (sft → another); consult 1 rows; no problem found\n",
    )


def test_holding_out_every_row_is_refused_before_anything_runs(project):
    text = project.model() + "  sft: {data: consult, eval_size: 5, template: plain}\n"
    assert project.validate(text) == refused(
        "x.yaml:8:35: stage `sft`: `eval_size` holds out 5 of 1 rows; nothing is left to train on"
    )


@pytest.mark.parametrize("read", [False, True])
def test_data_that_changes_while_the_run_goes_on_stops_the_stage_that_reads_it(project, read):
    step = project.plan()["sft"]
    pretend_to_start(step)
    check_unchanged(step, Hashes(None), read=read)
    project.write("consult.jsonl", '{"instruction": "a", "output": "c"}\n')
    with pytest.raises(StageFailed) as caught:
        check_unchanged(step, Hashes(None), read=read)
    assert str(caught.value) == "stage `sft`: `consult.jsonl` changed while the run was going on; run again"


def test_a_base_model_that_changes_stops_every_stage_that_starts_from_an_adapter_on_it(project):
    step = project.plan(project.model() + "  pt: {data: books, lora: {r: 8}}\n  sft: {data: consult}\n")["sft"]
    adapter = Path(step.inputs.model[-1])
    adapter.mkdir(parents=True)
    artifact.finish(adapter, adapter, {}, Hashes(None))
    check_unchanged(step, Hashes(None))
    project.model(hidden_size=8)
    with pytest.raises(StageFailed, match=r"^stage `sft`: `m/config.json` changed while the run was going on"):
        check_unchanged(step, Hashes(None))


def pretend_to_start(step):
    """Leave the finished folders that the step starts from."""
    for folder in map(Path, step.inputs.model):
        folder.mkdir(parents=True)
        (folder / "model.safetensors").write_bytes(b"weights")
        artifact.finish(folder, folder, {}, Hashes(None))


def test_a_folder_that_rotted_is_never_started_from(project):
    """The disk changed a bit and no time: what is remembered of the file still fits."""
    step = project.plan()["sft"]
    pretend_to_start(step)
    path = Path(step.inputs.model[-1]) / "model.safetensors"
    hashes = Hashes(Path("saves/.hashes.json"))
    hashes.one(path, clock=path.stat().st_ctime_ns + 1)
    path.write_bytes(b"weightr")
    stat = path.stat()
    ((key, entry),) = hashes.known.items()
    hashes.known[key] = [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, entry[3]]
    check_unchanged(step, hashes)
    with pytest.raises(StageFailed) as caught:
        check_unchanged(step, hashes, read=True)
    assert str(caught.value) == (
        f"stage `sft`: `{step.inputs.model[-1]}`, which it starts from, is damaged (`model.safetensors` has changed); "
        "nothing was read from it; run again to rebuild it"
    )
    with pytest.raises(StageFailed):  # and now that is remembered
        check_unchanged(step, hashes)


# Data files


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("consult.jsonl", "", ["4:3: data `consult`: `consult.jsonl` holds no rows"]),
        (
            "consult.jsonl",
            '{"instruction": "a", "output": "b"}\n\n{"instruction": "a", "output": \n',
            ["4:3: data `consult`: consult.jsonl:3: not valid JSON (Expecting value at column 31)"],
        ),
        (
            "consult.jsonl",
            '{"instruction": "a", "output": "b"}\n{"instruction": "a"}\n{"instruction": "a", "output": ""}\n',
            [
                "4:3: data `consult`: consult.jsonl:2: the row has no `output`; alpaca rows need `instruction` and "
                "`output` (map other names with `columns:`)",
                "4:3: data `consult`: consult.jsonl:3: `output` is empty; fill it in or remove the row",
            ],
        ),
        (
            "prefer.jsonl",
            '{"prompt": "a", "chosen": "b", "rejected": "c"}\n{"prompt": "a", "chosen": "b", "rejected": "b"}\n',
            [
                "5:3: data `prefer`: prefer.jsonl:2: `chosen` and `rejected` are the same; a pair must differ to "
                "teach anything"
            ],
        ),
    ],
)
def test_data_that_cannot_be_used_is_refused_once_and_where_it_is_declared(project, name, content, expected):
    project.write(name, content)
    assert project.validate(CHAIN) == refused(*(f"x.yaml:{problem}" for problem in expected))


def test_data_that_is_not_there_is_refused_and_a_near_name_told(project):
    text = INIT.replace("books.jsonl", "bookz.jsonl")
    assert project.validate(text) == refused(
        "x.yaml:3:3: data `books`: `bookz.jsonl` does not exist; did you mean `books.jsonl`?"
    )
    assert project.validate(text.replace("bookz.jsonl", "no/books.jsonl")) == refused(
        "x.yaml:3:3: data `books`: `no/books.jsonl` does not exist; there is no folder `no`"
    )


def test_problems_of_model_data_and_settings_are_reported_at_once_in_the_order_of_the_file(project):
    text = project.model() + "  sft: {data: consult, lora: {target_modules: [dense]}}\n  dpo: {data: prefer}\n"
    text = text.replace("template: med", "template: qwen")
    project.write("consult.jsonl", "")
    project.write("prefer.jsonl", "[]\n")
    assert project.validate(text, "--saves", "x.yaml/saves") == refused(
        "x.yaml/saves: cannot be written; choose another folder with `--saves DIR`",
        "x.yaml:2:11: stage `sft`: the template writes `<|im_end|>`, `<|im_start|>`, which the tokenizer of `m` does "
        'not know as one token; write `add_tokens: ["<|im_end|>", "<|im_start|>"]` at the top, ' + CHOOSE,
        "x.yaml:2:11: stage `dpo`: the template writes `<|im_end|>`, `<|im_start|>`, which the tokenizer of the model "
        'of `sft` does not know as one token; write `add_tokens: ["<|im_end|>", "<|im_start|>"]` at the top, ' + CHOOSE,
        "x.yaml:5:3: data `consult`: `consult.jsonl` holds no rows",
        "x.yaml:6:3: data `prefer`: `prefer.jsonl` holds no rows",
        "x.yaml:8:47: stage `sft`: `dense` matches no linear layer of `m`; it has `q_proj`",
    )


@pytest.mark.parametrize("saves", ["books.jsonl", "books.jsonl/saves/deep"])
def test_saves_that_cannot_be_a_folder_are_refused(project, monkeypatch, saves):
    monkeypatch.setattr("stages.runtime.hashes.COARSEST_TICK_NS", -(10**10))  # so that there are hashes to be saved
    assert project.validate(INIT, "--saves", saves) == refused(
        f"{saves}: cannot be written; choose another folder with `--saves DIR`"
    )


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_saves_that_are_read_only_are_refused(project):
    (project.folder / "saves").mkdir(mode=0o555)
    assert project.validate(INIT) == refused("saves: cannot be written; choose another folder with `--saves DIR`")


def test_saves_on_a_read_only_file_system_are_refused(project, monkeypatch):
    monkeypatch.setattr(placing, "_read_only", lambda folder: True)
    assert project.validate(INIT) == refused("saves: cannot be written; choose another folder with `--saves DIR`")


# Fingerprints


def test_a_plan_says_what_each_stage_starts_from(project):
    steps = project.plan()
    folder = {name: str(step.folder) for name, step in steps.items()}
    assert {name: step.inputs.model for name, step in steps.items()} == {
        "init": [],
        "pt": [folder["init"]],
        "sft": [folder["init"], folder["pt"]],
        "dpo": [folder["init"], folder["pt"], folder["sft"]],
        "merge": [folder["init"], folder["pt"], folder["sft"], folder["dpo"]],
        "quantize": [folder["merge"]],
    }
    assert {(step.state, step.why) for step in steps.values()} == {("run", "has not run yet")}


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("template: med", "# a comment\ntemplate: med  # another\nquestion: 感冒了？"),
        ("data: consult\n    lora: {r: 8}", "lora: {r: 8}\n    data: consult"),
        ("learning_rate: 5e-5, logging_steps: 10", "logging_steps: 10, learning_rate: 0.00005"),
        ("logging_steps: 10", "logging_steps: 1, save_steps: 7, run_name: x"),
        ("  books: {path: books.jsonl, format: text}\n", "  books: {format: text, path: ./books.jsonl}\n"),
        ("consult", "consultations"),
        ("quantize: {", "quantize: {question: 感冒了？, "),
    ],
    ids=["comments", "key order", "number form", "logging", "path form", "data name", "question"],
)
def test_what_changes_no_weight_changes_no_fingerprint(project, old, new):
    text = CHAIN.replace(old, new).replace("path: consultations.jsonl", "path: consult.jsonl")
    assert project.changed(text) == []


def test_moving_a_data_file_changes_no_fingerprint(project):
    before = project.plan()
    project.write("elsewhere/rows.jsonl", (project.folder / "consult.jsonl").read_bytes())
    (project.folder / "consult.jsonl").unlink()
    after = project.plan(CHAIN.replace("consult.jsonl", "elsewhere/rows.jsonl"))
    assert [step.fingerprint for step in before.values()] == [step.fingerprint for step in after.values()]


def test_the_names_of_config_and_stages_change_no_folder(project):
    before = project.plan()
    text = CHAIN.replace("  dpo: {", "  align: {use: dpo, ")
    after = project.plan(text, name="another.yaml")
    assert [step.folder for step in before.values()] == [step.folder for step in after.values()]
    assert (before["dpo"].link, after["align"].link) == (Path("saves/x/dpo"), Path("saves/another/align"))


@pytest.mark.parametrize(
    ("assignment", "changed"),
    [
        ("init.hidden_size=64", STAGES),
        ("seed=7", STAGES),
        ("template=plain", STAGES),
        ("pt.lora.r=4", STAGES[1:]),
        ("sft.trainer.learning_rate=2e-5", STAGES[2:]),
        ("sft.trainer.max_length=512", STAGES[2:]),
        ("sft.eval_data=consult", STAGES[2:]),
        ("sft.data=[consult, consult]", STAGES[2:]),
        ("sft.launch.processes=2", STAGES[2:]),
        ("data.prefer.max_samples=1", STAGES[3:]),
        ("dpo.model=$pt", STAGES[3:]),
        ("merge.shard_size=2GB", STAGES[4:]),
        ("quantize.gptq.sym=false", STAGES[5:]),
        ("quantize.seed=7", STAGES[5:]),
    ],
)
def test_a_changed_value_changes_its_stage_and_those_below(project, assignment, changed):
    assert project.changed(CHAIN, assignment) == changed


def test_changed_data_changes_the_stages_that_read_it_even_with_equal_size_and_time(project):
    before = project.plan()
    path = project.folder / "prefer.jsonl"
    stat = path.stat()
    path.write_text(ROWS["prefer.jsonl"].replace('"c"', '"d"'), encoding="utf-8")
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (stat.st_size, stat.st_mtime_ns)
    after = project.plan()
    assert [name for name in before if before[name].fingerprint != after[name].fingerprint] == STAGES[3:]


def test_changed_weights_of_a_model_folder_change_every_stage(project):
    text = project.model() + SFT + "  merge:\n"
    before = project.plan(text)
    project.model(weights={"model.layers.0.self_attn.k_proj.weight": [4, 4]})
    after = project.plan(text)
    assert all(before[name].fingerprint != after[name].fingerprint for name in ("sft", "merge"))


def test_a_moved_model_folder_changes_no_fingerprint(project):
    before = project.plan(project.model("m") + SFT)
    after = project.plan(project.model("elsewhere/m") + SFT)
    assert before["sft"].fingerprint == after["sft"].fingerprint


def test_a_version_of_a_library_or_of_the_stage_changes_the_fingerprint(project, monkeypatch):
    before = project.plan()
    monkeypatch.setattr("stages.dpo.STAGE", replace(dpo.STAGE, version=99))
    after = project.plan()
    assert [name for name in before if before[name].fingerprint != after[name].fingerprint] == STAGES[3:]
    monkeypatch.setattr(fingerprint, "_version", lambda library: "0.0.1")
    assert [name for name, step in project.plan().items() if step.fingerprint != after[name].fingerprint] == STAGES


def test_configs_with_the_same_beginning_share_its_folders(project):
    one, other = project.plan(), project.plan(CHAIN, "dpo.trainer.beta=0.3", name="other.yaml")
    assert [name for name in STAGES if one[name].folder == other[name].folder] == ["init", "pt", "sft"]


# What runs, and why


def why(project, text=CHAIN, *assignments):
    return {name: (step.state, step.why) for name, step in project.plan(text, *assignments).items()}


DONE = ("done", "nothing it depends on has changed")


@pytest.fixture
def ran(project):
    """The project after a run of the chain."""
    for step in project.plan().values():
        pretend(step)
    return project


def test_a_chain_that_ran_is_done(ran):
    assert why(ran) == dict.fromkeys(STAGES, DONE)


def test_a_changed_value_is_named_old_and_new_with_its_line(ran):
    text = CHAIN.replace("learning_rate: 5e-5", "learning_rate: 2e-5")
    assert why(ran, text) == {
        "init": DONE,
        "pt": DONE,
        "sft": ("run", "because `trainer.learning_rate` 5e-05 → 2e-05 (x.yaml:12)"),
        "dpo": ("run", "because `sft` above it will run"),
        "merge": ("run", "because `dpo` above it will run"),
        "quantize": ("run", "because `merge` above it will run"),
    }


@pytest.mark.parametrize(
    ("text", "assignments", "stage", "expected"),
    [
        ("seed: 7\n" + CHAIN, [], "init", "`seed` 42 → 7 (x.yaml:1)"),
        (CHAIN.replace("template: med", "template: plain"), [], "init", "`template` changed (x.yaml:1)"),
        (CHAIN, ["sft.lora.r=4"], "sft", "`lora.r` 8 → 4 (--set sft.lora.r)"),
        (CHAIN, ["sft.lora="], "sft", '`lora` {"r": 8} → not set (--set sft.lora)'),
        (CHAIN, ["sft.lora.lora_alpha=16"], "sft", "`lora.lora_alpha` not set → 16 (--set sft.lora.lora_alpha)"),
        (
            CHAIN.replace("{learning_rate: 5e-5, logging_steps: 10}", "{logging_steps: 10}"),
            [],
            "sft",
            "`trainer.learning_rate` 5e-05 → not set",
        ),
        (
            CHAIN,
            [f"sft.trainer.{setting}=0.5" for setting in ("max_grad_norm", "adam_beta1", "adam_beta2", "warmup_steps")],
            "sft",
            "`trainer.max_grad_norm` not set → 0.5 (--set sft.trainer.max_grad_norm), `trainer.adam_beta1` not set → "
            "0.5 (--set sft.trainer.adam_beta1), `trainer.adam_beta2` not set → 0.5 (--set sft.trainer.adam_beta2) "
            "and 1 more",
        ),
        (CHAIN, ["dpo.data=[prefer, prefer]"], "dpo", "`data` changed (--set dpo.data)"),
    ],
)
def test_every_change_has_a_clause(ran, text, assignments, stage, expected):
    assert why(ran, text, *assignments)[stage] == ("run", f"because {expected}")


def test_changed_data_is_named_by_the_setting_that_reads_it(ran):
    ran.write("consult.jsonl", '{"instruction": "a", "output": "c"}\n')
    found = why(ran)
    assert found["sft"] == ("run", "because `consult.jsonl` changed (1 row)")
    assert found["quantize"] == ("run", "because `consult.jsonl` changed (1 row)")


def test_another_version_is_named(ran, monkeypatch):
    versions = installed_versions
    monkeypatch.setattr(
        placing, "installed_versions", lambda use: {**versions(use), **({"trl": "9.9"} if use == "dpo" else {})}
    )
    old = versions("dpo")["trl"]
    assert why(ran)["dpo"] == ("run", f"because `trl` {old} → 9.9")


def test_another_model_at_the_start_is_the_reason(project):
    for step in project.plan(project.model("m") + SFT).values():
        pretend(step)
    text = project.model("other", weights={"model.layers.0.mlp.up_proj.weight": [4, 4]}) + SFT
    assert why(project, text) == {"sft": ("run", "because the model it starts from changed")}


def test_a_damaged_folder_is_made_anew_and_those_below_stay(ran):
    (ran.plan()["sft"].folder / "model.safetensors").write_bytes(b"torn")
    expected = "its folder is damaged (`model.safetensors` has 4 bytes instead of 7); it is rebuilt"
    assert why(ran) == {**dict.fromkeys(STAGES, DONE), "sft": ("run", expected)}


# Unfinished work


def begin(project, step, *reached, **changes):
    """Leave what a run of this step leaves that was killed, with sealed checkpoints."""
    step.part.mkdir(parents=True, exist_ok=True)
    planned = Plan(load_config(Path("x.yaml")), Path("saves"), Hashes(None))
    (step.part / "spec.json").write_text(json.dumps({**step_module.begin(step, planned), **changes}), encoding="utf-8")
    for number in reached:
        checkpoint = step.part / "checkpoints" / f"checkpoint-{number}"
        checkpoint.mkdir(parents=True)
        (checkpoint / "trainer_state.json").write_text('{"max_steps": 12}', encoding="utf-8")
        seal(checkpoint)


def test_a_stage_that_was_stopped_goes_on_at_its_newest_sealed_checkpoint(project):
    step = project.plan()["pt"]
    begin(project, step, 5, 10, 11)
    (step.part / "checkpoints/checkpoint-11/complete.json").unlink()
    assert why(project)["pt"] == ("resume", "goes on at step 10 of 12")


def test_going_on_with_another_kind_of_machine_is_told(project):
    step = project.plan()["pt"]
    begin(project, step, 5, gpu=True)
    text = "goes on at step 5 of 12; begun with a GPU, so the weights will not be bit for bit the same"
    assert why(project)["pt"] == ("resume", text)


def test_a_stage_that_would_not_go_on_exactly_says_so(project):
    text = CHAIN.replace("logging_steps: 10}", "dataloader_persistent_workers: true, dataloader_num_workers: 1}")
    project.write("x.yaml", text)
    planned = build_plan(load_config(Path("x.yaml")), Path("saves"))
    reason = "with `dataloader_persistent_workers`, dropout draws other numbers after a stop; remove it"
    assert planned.notes == [f"stage `sft` does not go on bit for bit after a stop: {reason}"]
    assert {step.name: step.inexact for step in planned.steps} == {**dict.fromkeys(STAGES), "sft": reason}


LOWER = CHAIN.replace("learning_rate: 5e-5", "learning_rate: 2e-5")
CHANGE = "`trainer.learning_rate` 5e-05 → 2e-05 (x.yaml:12)"
REFUSAL = (
    f"was stopped at step 5 of 12, and now {CHANGE}. Undo that to go on from there, or start over with `--fresh sft`"
)


def run(project, text, *words):
    """The exit code of `run` and its error output."""
    project.write("x.yaml", text)
    code = main(["run", "x.yaml", *words])
    return code, project.capsys.readouterr().err


def test_unfinished_work_with_other_settings_is_refused_with_the_difference_and_two_ways_out(project):
    begin(project, project.plan()["sft"], 5)
    assert why(project, LOWER)["sft"] == ("refused", REFUSAL)
    assert run(project, LOWER) == (2, f"x.yaml: stage `sft` {REFUSAL}\n")
    assert why(project)["sft"] == ("resume", "goes on at step 5 of 12")  # the first way out
    assert why(project, LOWER.replace("logging_steps: 10", "logging_steps: 1"))["sft"] == ("refused", REFUSAL)


def test_unfinished_work_of_another_launch_is_refused_with_a_word_about_exactness(project):
    two = CHAIN.replace("    data: consult\n", "    data: consult\n    launch: {processes: 2, strategy: zero3}\n")
    begin(project, project.plan(two)["sft"], 5)
    changes = (
        "`launch.processes` 2 → 1, `launch.strategy` zero3 → ddp, and the last bits of the result depend on `launch`"
    )
    assert why(project)["sft"] == ("refused", REFUSAL.replace(CHANGE, changes))


def test_unfinished_work_is_refused_too_when_what_it_starts_from_changed(project):
    begin(project, project.plan()["sft"], 5)
    text = CHAIN.replace("pt: {data: books, lora: {r: 8}}", "pt: {data: books, lora: {r: 4}}")
    assert why(project, text)["sft"] == ("refused", REFUSAL.replace(CHANGE, "`pt` above it will run"))


def test_the_second_way_out_starts_over_and_keeps_the_work_for_going_back(project):
    old = project.plan()["sft"]
    begin(project, old, 5)
    project.write("x.yaml", LOWER)
    planned = build_plan(load_config(Path("x.yaml")), Path("saves"), fresh=["sft"])
    refuse_plan(planned)
    step = next(step for step in planned.steps if step.name == "sft")
    assert (step.state, step.why, step.left) == ("run", "`--fresh` starts it over", (old.part,))
    runner._make_room(step)
    assert why(project, LOWER)["sft"] == ("run", "has not run yet")
    assert why(project)["sft"] == ("resume", "goes on at step 5 of 12")


def test_work_that_never_reached_a_checkpoint_is_no_loss(project):
    begin(project, project.plan()["sft"])
    assert why(project, LOWER)["sft"] == ("run", "has not run yet")


@pytest.mark.parametrize("other", [{"of": "y"}, {"stage": "sft2"}, {"of": None}])
def test_unfinished_work_of_others_is_none_of_our_business(project, other):
    begin(project, project.plan()["sft"], 5, **other)
    assert why(project, LOWER)["sft"] == ("run", "has not run yet")


def test_a_stage_can_be_started_over_with_the_same_settings(project):
    step = project.plan()["pt"]
    begin(project, step, 5)
    planned = build_plan(load_config(Path("x.yaml")), Path("saves"), fresh=["pt"])
    assert [(step.state, step.why) for step in planned.steps][1] == ("run", "`--fresh` starts it over")
    runner._make_room(planned.steps[1])
    assert sorted(path.name for path in Path("saves").glob("pt-*")) == [step.part.name, f"{step.part.name}.old-1"]
    assert not list(step.part.iterdir())


def test_a_finished_stage_can_be_made_again_and_is_kept_aside(ran):
    planned = build_plan(load_config(Path("x.yaml")), Path("saves"), fresh=["pt"])
    assert [step.state for step in planned.steps] == ["done", "run", "done", "done", "done", "done"]
    runner._make_room(planned.steps[1])
    kept = planned.steps[1].folder.with_name(f"{planned.steps[1].folder.name}.old-1")
    assert (kept / "model.safetensors").read_bytes() == b"weights"


def test_only_a_stage_that_will_be_looked_at_can_be_started_over(project):
    project.write("x.yaml", CHAIN)
    pipeline = load_config(Path("x.yaml"))
    with pytest.raises(ConfigError) as error:
        build_plan(pipeline, Path("saves"), until="pt", fresh=["dpoo", "sft", "pt"])
    assert error.value.problems == [
        "--fresh dpoo: there is no such stage; did you mean `dpo`?",
        "--fresh sft: it comes after `--until pt`",
    ]


# What it takes


def test_a_disk_that_is_too_small_is_told_before_anything_runs(project, monkeypatch):
    """Full fine-tuning of 30M weights: two checkpoints and one being written, each of weights and two moments."""
    weights = {"model.embed_tokens.weight": [3_000, 10_000]}
    text = project.model() + SFT
    header = json.dumps(
        {name: {"dtype": "F32", "shape": shape, "data_offsets": [0, 4 * 3 * 10**7]} for name, shape in weights.items()}
    ).encode()
    with open("m/model.safetensors", "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + 4 * 3 * 10**7)  # a hole: it takes no room
    usage = shutil.disk_usage(".")
    free = 10 * 10**8
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=free))
    text = text.replace("lora: {r: 8}, ", "")
    (problem,) = problems(project, text)
    assert problem == (
        "saves: stage `sft` takes at least 1.2 GB of disk, and 1.0 GB are free; free space, keep fewer checkpoints "
        "with `trainer.save_total_limit: 1`, or choose another disk with `--saves DIR`"
    )
    free = 13 * 10**8
    assert problems(project, text) == []
    # What a stage leaves stays while the next one works; at that time it has no checkpoints any more.
    (problem,) = problems(project, text + "  more: {use: sft, data: consult, seed: 1}\n")
    assert problem.startswith(
        "saves: stage `more` takes at least 1.2 GB of disk after 120.0 MB of the stages before it, and"
    )
    free = 14 * 10**8
    assert problems(project, text + "  more: {use: sft, data: consult, seed: 1}\n") == []


# Nothing leads out of `saves`


def problems(project, text=CHAIN):
    project.write("x.yaml", text)
    return build_plan(load_config(Path("x.yaml")), Path("saves")).problems


@pytest.mark.parametrize("end", ["", ".part"])
def test_a_stage_s_folder_that_is_a_link_is_refused(project, end):
    step = project.plan()["pt"]
    Path("elsewhere").mkdir()
    Path(f"{step.folder}{end}").symlink_to(Path("elsewhere").resolve())
    expected = f"{step.folder}{end}: is a symbolic link; results are kept in `saves` itself; remove it"
    assert problems(project) == [expected]


def test_links_that_lead_elsewhere_are_refused(project):
    project.plan()
    Path("elsewhere").mkdir()
    Path("saves/x").symlink_to(Path("elsewhere").resolve())
    assert problems(project) == ["saves/x: is a symbolic link, so results would be written elsewhere; remove it"]


def test_what_is_in_the_way_of_a_link_is_not_replaced(project):
    project.write("saves/x/pt/mine.txt", "")
    assert problems(project) == ["saves/x/pt: is in the way of a link to the stage's folder; move it"]


def test_a_file_in_the_way_of_the_links_is_not_replaced(project):
    project.write("saves/x", "")
    assert problems(project) == ["saves/x: is in the way of the folder with the links to the stages; move it"]


def test_saves_may_be_a_link_itself(project):
    Path("disk").mkdir()
    Path("saves").symlink_to(Path("disk").resolve())
    assert problems(project) == []


@pytest.mark.parametrize(
    ("name", "folder"),
    [
        ("...yaml", "_.."),
        (".locks.yaml", "_.locks"),
        ("sft-0123456789ab.yaml", "_sft-0123456789ab"),
        ("my config.yaml", "my_config"),
        ("x.y.yaml", "x.y"),
    ],
)
def test_the_name_of_a_config_cannot_be_that_of_anything_else_in_saves(name, folder):
    assert folder_name(Path(name)) == folder


def test_two_configs_of_one_name_do_not_share_their_links(project):
    project.plan()
    project.write("a/x.yaml", CHAIN)
    project.write("saves/x/.config.json", json.dumps({"config": "../../a/x.yaml"}))
    assert problems(project) == [
        "x.yaml: `saves/x` holds the stages of `a/x.yaml`, a config of the same name; rename one of the two, or give "
        "this one a folder of its own with `--saves DIR`"
    ]
    Path("a/x.yaml").unlink()  # moved, say
    assert problems(project) == []


def test_a_folder_of_a_later_version_is_not_taken_for_damage(ran):
    step = ran.plan()["merge"]
    record = step.folder / "record.json"
    record.write_text(record.read_text(encoding="utf-8").replace('"schema": 1', '"schema": 2'), encoding="utf-8")
    assert problems(ran) == [
        f"`{record}` was written by a later version (schema 2; this one knows 1); update, or use another folder with "
        "`--saves DIR`"
    ]


def test_planning_writes_nothing_but_what_it_learnt_of_data(project, monkeypatch):
    monkeypatch.setattr("stages.runtime.hashes.COARSEST_TICK_NS", -(10**10))
    project.plan()
    written = sorted(path for path in Path("saves").rglob("*") if path.is_file())
    assert [str(path.parent) for path in written] == ["saves", *["saves/.rows"] * 6]
    stamps = [path.stat().st_mtime_ns for path in written]
    project.plan()
    assert stamps == [path.stat().st_mtime_ns for path in written]


def test_a_plan_ends_at_the_stage_it_is_asked_for(project):
    project.write("x.yaml", CHAIN)
    pipeline = load_config(Path("x.yaml"))
    assert [step.name for step in build_plan(pipeline, Path("saves"), until="sft").steps] == STAGES[:3]
    with pytest.raises(ConfigError) as error:
        build_plan(pipeline, Path("saves"), until="sftt")
    assert error.value.problems == ["--until sftt: there is no such stage; did you mean `sft`?"]


def test_a_step_cannot_be_changed(project):
    step = project.plan()["sft"]
    with pytest.raises(dataclasses.FrozenInstanceError):
        step.state = "done"
