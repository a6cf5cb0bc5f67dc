"""`convert`: the six commands of a known tutorial become one chained config, and the rules of that chain."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from converted import COMMIT, notes, stages, written

from pipeline.errors import ConfigError
from pipeline.tools.convert import convert

SIX = r"""#!/bin/bash
# continued pretraining
CUDA_VISIBLE_DEVICES=0 llamafactory-cli train \
    --stage pt \
    --do_train True \
    --model_name_or_path bigscience/bloom-7b1 \
    --finetuning_type lora \
    --template default \
    --dataset_dir data \
    --dataset medical_book_zh,train_encyclopedia \
    --cutoff_len 1024 \
    --learning_rate 5e-05 \
    --num_train_epochs 3.0 \
    --max_samples 100000 \
    --per_device_train_batch_size 2 \
    --per_device_eval_batch_size 2 \
    --gradient_accumulation_steps 8 \
    --lr_scheduler_type cosine \
    --max_grad_norm 1.0 \
    --logging_steps 5 --save_steps 100 --warmup_steps 0 \
    --packing True --report_to none \
    --output_dir saves/BLOOM-7B/lora/pt \
    --bf16 True --plot_loss True --optim adamw_torch \
    --lora_rank 8 --lora_alpha 16 --lora_dropout 0 --lora_target query_key_value \
    --val_size 0.05 --evaluation_strategy steps --eval_steps 100

# supervised fine-tuning
export CUDA_VISIBLE_DEVICES=0
python src/train.py --stage sft --do_train --model_name_or_path bigscience/bloomz-7b1 --dataset firefly,identity \
    --template default --finetuning_type lora --lora_target query_key_value --output_dir saves/BLOOMZ-7B/lora/sft \
    --overwrite_cache --overwrite_output_dir --cutoff_len 1024 --preprocessing_num_workers 16 \
    --per_device_train_batch_size 2 --per_device_eval_batch_size 1 --gradient_accumulation_steps 8 \
    --lr_scheduler_type cosine --logging_steps 2000 --warmup_steps 1000 --save_steps 2000 --eval_steps 2000 \
    --evaluation_strategy steps --load_best_model_at_end --learning_rate 5e-5 --num_train_epochs 1.0 \
    --max_samples 20000 --val_size 0.1 --plot_loss --bf16 > sft.log 2>&1

# preferences
llamafactory-cli train --stage dpo --do_train True --model_name_or_path bigscience/bloomz-7b1 --finetuning_type lora \
    --template default --dataset dpo_en_10k,dpo_zh_10k --cutoff_len 1024 --learning_rate 5e-05 --num_train_epochs 1.0 \
    --max_samples 30000 --per_device_train_batch_size 2 --per_device_eval_batch_size 1 \
    --gradient_accumulation_steps 8 --lr_scheduler_type cosine --max_grad_norm 1.0 --logging_steps 100 \
    --save_steps 100 --warmup_steps 50 --optim adamw_torch --packing False --report_to none \
    --output_dir saves/BLOOMZ-7B/lora/dpo --bf16 True --plot_loss True --lora_rank 4 --lora_alpha 8 \
    --lora_dropout 0 --lora_target query_key_value --val_size 0.01 --pref_beta 0.1 --pref_ftx 0 --pref_loss sigmoid

llamafactory-cli export merge.yaml
llamafactory-cli export quant.yaml
CUDA_VISIBLE_DEVICES=0 API_PORT=8000 llamafactory-cli api --model_name_or_path models/q4 --template default
"""
MERGE = """\
model_name_or_path: bigscience/bloomz-7b1
adapter_name_or_path: saves/BLOOMZ-7B/lora/dpo
template: default
finetuning_type: lora
export_dir: models/merged
export_size: 2
export_device: cpu
export_legacy_format: false
"""
QUANT = """\
model_name_or_path: models/merged
template: default
export_dir: models/q4
export_quantization_bit: 4
export_quantization_dataset: data/c4_demo.json
export_quantization_maxlen: 512
export_size: 2
export_device: cpu
"""
PAIRS = {"messages": "conversations", "chosen": "chosen", "rejected": "rejected"}
INFO = {
    "medical_book_zh": {"file_name": "medical_book_zh.json", "columns": {"prompt": "text"}},
    "train_encyclopedia": {"file_name": "train_encyclopedia.json", "columns": {"prompt": "text"}},
    "firefly": {"file_name": "firefly.jsonl", "columns": {"prompt": "input", "response": "target"}},
    "identity": {"file_name": "identity.json"},
    "dpo_en_10k": {"file_name": "dpo_en.json", "ranking": True, "formatting": "sharegpt", "columns": PAIRS},
    "dpo_zh_10k": {"file_name": "dpo_zh.json", "ranking": True,
                   "columns": {"prompt": "q", "chosen": "a", "rejected": "b"}},
}  # fmt: skip


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The folder that the commands run in."""
    monkeypatch.chdir(tmp_path)
    Path("data").mkdir()
    Path("data/dataset_info.json").write_text(json.dumps(INFO), encoding="utf-8")
    for name, text in {"six.sh": SIX, "merge.yaml": MERGE, "quant.yaml": QUANT}.items():
        Path(name).write_text(text, encoding="utf-8")
    return tmp_path


def test_the_six_commands_are_one_config(folder):
    _found, pipeline = written("six.sh")
    made = stages(pipeline)
    assert list(made) == ["pt", "sft", "dpo", "merge", "quantize"]
    assert [made[name].start for name in made] == [
        f"bigscience/bloom-7b1@{COMMIT}", f"bigscience/bloomz-7b1@{COMMIT}", "$sft", "$dpo", "$merge",
    ]  # fmt: skip
    assert made["pt"].config.lora == {"r": 8, "lora_alpha": 16, "target_modules": ["query_key_value"]}
    assert made["dpo"].config.lora == {"r": 4, "lora_alpha": 8, "target_modules": ["query_key_value"]}
    assert [made[name].config.eval_size for name in ("pt", "sft", "dpo")] == [0.05, 0.1, 0.01]
    assert made["pt"].config.trainer == {
        **{"max_length": 1024, "packing": True, "packing_strategy": "wrapped", "learning_rate": 5e-5},
        **{"lr_scheduler_type": "cosine", "warmup_steps": 0, "num_train_epochs": 3, "per_device_train_batch_size": 2},
        **{"per_device_eval_batch_size": 2, "gradient_accumulation_steps": 8, "max_grad_norm": 1},
        **{"optim": "adamw_torch", "bf16": True, "logging_steps": 5, "save_steps": 100, "eval_strategy": "steps"},
        "eval_steps": 100,
    }
    assert made["sft"].config.trainer["load_best_model_at_end"] is True
    assert made["sft"].config.trainer["warmup_steps"] == 1000
    assert {name: made["dpo"].config.trainer[name] for name in ("beta", "loss_type", "warmup_steps")} == {
        **{"beta": 0.1, "loss_type": "sigmoid", "warmup_steps": 50}
    }
    sources = {name: (source.path, source.format, source.max_samples) for name, source in pipeline.data.items()}
    assert sources == {
        "medical_book_zh": ("data/medical_book_zh.json", "text", 100_000),
        "train_encyclopedia": ("data/train_encyclopedia.json", "text", 100_000),
        "firefly": ("data/firefly.jsonl", "alpaca", 20_000),
        "identity": ("data/identity.json", "alpaca", 20_000),
        "dpo_en_10k": ("data/dpo_en.json", "preference", 30_000),
        "dpo_zh_10k": ("data/dpo_zh.json", "preference", 30_000),
        "c4_demo": ("data/c4_demo.json", "text", None),
    }
    assert pipeline.data["firefly"].columns == {"instruction": "input", "output": "target"}
    assert pipeline.data["dpo_zh_10k"].columns == {"instruction": "q", "chosen": "a", "rejected": "b"}
    quantize = made["quantize"].config
    assert (quantize.bits, quantize.group_size, quantize.shard_size) == (4, 128, "2GB")
    assert (quantize.calibration.samples, quantize.calibration.max_length) == (128, 512)


def test_the_notes_of_the_six_commands_say_what_differs_and_which_line_chains(folder):
    found, _ = written("six.sh")
    said = notes(found, "to do", "differs", "not supported", "unknown")
    assert [text for text in said if "starts from" in text] == [
        "`sft` starts from `bigscience/bloomz-7b1`, as the command does; to go on from `pt`, delete the line "
        f"`model: bigscience/bloomz-7b1@{COMMIT}` of `sft`",
        "`dpo` starts from `sft`; the command starts again from `bigscience/bloomz-7b1`; to do as it does, write "
        f"`model: bigscience/bloomz-7b1@{COMMIT}` under `dpo`",
    ]
    assert "no stage: `pipeline chat` and `pipeline serve` use what the last stage leaves" in notes(found, "not needed")
    chained = next(str(note) for note in found.notes if "starts from" in note.text)
    assert chained.startswith("six.sh:29: differs: `sft` starts from")
    line = f"    model: bigscience/bloomz-7b1@{COMMIT}\n"
    assert line in found.text
    Path("out.yaml").write_text(found.text.replace(line, ""), encoding="utf-8")
    from pipeline.config.checker import load_config

    assert stages(load_config(Path("out.yaml")))["sft"].start == "$pt"


def test_the_text_is_ordered_and_commented_like_the_shipped_configs(folder):
    found, _ = written("six.sh")
    lines = found.text.splitlines()
    assert lines[0] == "# Converted from six.sh."
    tops = [line.partition(":")[0] for line in lines if line[:1] not in ("#", " ")]
    assert tops == ["model", "template", "data", "stages"]
    assert "    eval_size: 0.05                             # val_size" in lines
    assert "      max_length: 1024                          # cutoff_len" in lines
    assert all(len(line) <= 120 for line in lines)


def test_the_template_lies_beside_the_config(folder):
    found, pipeline = written("six.sh", out="configs/med.yaml")
    assert list(found.files) == [Path("configs/default.jinja")]
    assert "template: configs/default.jinja\n" in found.text
    assert stages(pipeline)["sft"].template == found.files[Path("configs/default.jinja")]


# What a chain is


BASE = "--model_name_or_path org/base --do_train"


def command(stage, rest, base=BASE):
    data = {"pt": "medical_book_zh", "sft": "identity"}.get(stage, "dpo_en_10k")
    return f"llamafactory-cli train --stage {stage} {base} --dataset {data} {rest}"


@pytest.mark.parametrize(
    ("lines", "starts"),
    [
        (["pt --output_dir a", "sft --output_dir b"], {"pt": "BASE", "sft": "$pt"}),  # the same base: a chain
        (["sft --output_dir a", "dpo --adapter_name_or_path a"], {"sft": "BASE", "dpo": "$sft"}),
        (["sft --output_dir a", "dpo --adapter_name_or_path ./a/"], {"sft": "BASE", "dpo": "$sft"}),
        (
            ["sft --output_dir a", "dpo --output_dir b --adapter_name_or_path a", "dpo --adapter_name_or_path a"],
            {"sft": "BASE", "dpo": "$sft", "dpo_2": "$sft"},
        ),
        (["sft --output_dir a", "sft --output_dir b"], {"sft": "BASE", "sft_2": "BASE"}),  # two runs to compare
        (["sft --output_dir a", "rm --output_dir b", "dpo --output_dir c"],
         {"sft": "BASE", "reward": "$sft", "dpo": "$sft"}),
        (["pt --output_dir a --finetuning_type full", "sft --model a"], {"pt": "BASE", "sft": "$pt"}),
    ],
)  # fmt: skip
def test_a_stage_starts_where_its_command_says(folder, lines, starts):
    sources = []
    for line in lines:
        stage, _, rest = line.partition(" ")
        base = f"--model_name_or_path {rest[-1]} --do_train" if rest.startswith("--model") else BASE
        sources.append(command(stage, "" if rest.startswith("--model") else rest, base))
    _, pipeline = written(*sources)
    base = f"org/base@{COMMIT}"
    assert {name: stage.start for name, stage in stages(pipeline).items()} == {
        name: base if start == "BASE" else start for name, start in starts.items()
    }


def test_an_adapter_from_elsewhere_is_named_with_a_note(folder):
    found, pipeline = written(command("dpo", "--adapter_name_or_path saves/sft"))
    assert stages(pipeline)["dpo"].start == "./saves/sft"
    assert "`dpo` starts from the adapter `./saves/sft`, whose own base model is used, not `org/base`" in notes(
        found, "differs"
    )
    missing = "`./saves/sft` is not here; if another command writes it, name that command before this one"
    assert missing in notes(found, "to do")


def test_stages_that_agree_share_seed_launch_and_template_and_others_have_their_own(folder):
    one, two = (
        "torchrun --nproc_per_node 4 src/train.py --seed 7 --template llama3",
        "llamafactory-cli train --template yi",
    )
    sft, dpo = command("sft", "--output_dir a")[22:], command("dpo", "--adapter_name_or_path a")[22:]
    found, pipeline = written(f"{one}{sft}", f"{one}{dpo}")
    assert "template: llama3\nseed: 7\nlaunch: {processes: 4}\n" in found.text
    found, pipeline = written(f"{one}{sft}", f"{two}{dpo}")
    made = stages(pipeline)
    assert [made[name].config.seed for name in made] == [7, 42]
    assert [made[name].launch.processes for name in made] == [4, 1]
    assert made["sft"].template != made["dpo"].template
    assert "\nseed:" not in found.text


def test_a_hub_name_without_a_known_commit_is_something_to_do(folder):
    found = convert([command("sft", "")], Path("out.yaml"), commit_of=lambda kind, name: None)
    assert "model: org/base@COMMIT\n" in found.text
    shows = "`git ls-remote https://huggingface.co/org/base HEAD` shows it"
    assert notes(found, "to do") == [f"`org/base`: write its commit for COMMIT; {shows}"]


def test_the_commit_of_the_copy_on_this_machine_is_used(folder, monkeypatch):
    from pipeline.tools.convert_hub import local_commit

    monkeypatch.setenv("HF_HUB_CACHE", str(folder / "hub"))
    assert local_commit("model", "org/base") is None
    refs = folder / "hub" / "models--org--base" / "refs"
    refs.mkdir(parents=True)
    (refs / "main").write_text(COMMIT, encoding="utf-8")
    found = convert([command("sft", "")], Path("out.yaml"))
    assert f"model: org/base@{COMMIT}\n" in found.text


def test_the_hub_is_asked_where_this_machine_has_no_copy(folder, monkeypatch):
    from pipeline.tools.convert_hub import pinned_commit

    def reached(self, name, **options):
        return SimpleNamespace(sha=f"{name} {options['repo_type']}")

    def unreachable(self, name, **options):
        raise ConnectionError("no route")

    monkeypatch.setenv("HF_HUB_CACHE", str(folder / "hub"))
    monkeypatch.setattr("huggingface_hub.HfApi.repo_info", reached)
    assert pinned_commit("dataset", "org/set") == "org/set dataset"
    monkeypatch.setattr("huggingface_hub.HfApi.repo_info", unreachable)
    assert pinned_commit("model", "org/base") is None


def test_a_revision_that_is_a_commit_is_kept(folder):
    found = convert([command("sft", f"--model_revision {'a' * 40}")], Path("out.yaml"), commit_of=lambda *_: None)
    assert f"model: org/base@{'a' * 40}\n" in found.text


# Shell scripts and command lines


@pytest.mark.parametrize(
    "line",
    [
        "llamafactory-cli train {}",
        "lmf train {}",
        "python src/train.py {}",
        "python3 src/train_bash.py {}",
        "CUDA_VISIBLE_DEVICES=0 WANDB_DISABLED=true llamafactory-cli train {}",
        "nohup llamafactory-cli train {} > log.txt 2>&1 &",
        "accelerate launch --config_file fsdp.yaml src/train.py {}",
        "torchrun --nproc_per_node=1 --master_port 29500 src/train.py {}",
        "deepspeed --num_gpus 1 src/train.py {}",
        "cd LLaMA-Factory && llamafactory-cli train {}",
        "python -m llamafactory.cli train {}",
        "#!/bin/bash\nset -e\nMODEL=org/base\nOUT=${{OUT:-saves/x}}\nllamafactory-cli train {}\n",
    ],
)
def test_a_train_command_is_recognised(folder, line):
    arguments = "--stage sft --do_train --model_name_or_path org/base --dataset identity --learning_rate=1e-4 --bf16"
    _found, pipeline = written(line.format(arguments))
    made = stages(pipeline)["sft"]
    assert made.start == f"org/base@{COMMIT}"
    assert made.config.trainer["learning_rate"] == 1e-4
    assert made.config.trainer["bf16"] is True


def test_variables_and_overrides_of_a_file_are_filled_in(folder):
    Path("sft.yaml").write_text("stage: sft\ndo_train: true\nmodel_name_or_path: org/other\ndataset: identity\n")
    script = (
        "export LR=2e-5\nBASE=org/base\nllamafactory-cli train sft.yaml model_name_or_path=$BASE learning_rate=${LR}\n"
    )
    Path("run.sh").write_text(script, encoding="utf-8")
    _, pipeline = written("run.sh")
    made = stages(pipeline)["sft"]
    assert made.start == f"org/base@{COMMIT}"
    assert made.config.trainer["learning_rate"] == 2e-5


@pytest.mark.parametrize(
    ("script", "rate", "name"),
    [
        ('A="--learning_rate 1e-5 --run_name a"; {} $A\n', 1e-5, "a"),  # an unquoted value is several words
        ('N="a b"\n{} --run_name "$N" --learning_rate 2e-5 # --learning_rate 1\n', 2e-5, "a b"),
        ("{} --run_name 'a;b&c' --learning_rate 3e-5 2>&1 | tee log; echo done\n", 3e-5, "a;b&c"),
        ("{} --learning_rate ${{LR:-4e-5}} --run_name '$N' &> log &\n", 4e-5, "$N"),
        ("# {} --learning_rate 1\n{} \\\n  --learning_rate 5e-5 \\\n  # a comment\n  --run_name c#d\n", 5e-5, "c#d"),
    ],
)
def test_the_words_of_a_shell(folder, script, rate, name):
    command_ = command("sft", "--report_to wandb")
    Path("run.sh").write_text(script.format(command_, command_), encoding="utf-8")
    found, pipeline = written("run.sh")
    trainer = stages(pipeline)["sft"].config.trainer
    assert (trainer["learning_rate"], trainer["run_name"]) == (rate, name)
    assert notes(found, "unknown") == []


def test_words_of_one_command_are_one_source(folder):
    _, pipeline = written(*command("sft", "--lora_rank 4").split())
    assert stages(pipeline)["sft"].config.lora == {"r": 4, "lora_alpha": 8}


@pytest.mark.parametrize(
    ("words", "launch"),
    [
        ("--deepspeed examples/deepspeed/ds_z3_config.json", {"strategy": "zero3"}),
        ("--deepspeed own.json", {"strategy": "zero2", "offload": "optimizer"}),
        ("--fsdp 'full_shard auto_wrap offload'", {"strategy": "fsdp2", "offload": "parameters"}),
    ],
)
def test_deepspeed_and_fsdp_are_strategies_and_the_rows_of_a_step_stay(folder, words, launch):
    zero = {"stage": 2, "offload_optimizer": {"device": "cpu"}}
    Path("own.json").write_text(json.dumps({"zero_optimization": zero}), encoding="utf-8")
    batch = "--per_device_train_batch_size 2 --gradient_accumulation_steps 8"
    found, _ = written("torchrun --nproc_per_node 4 src/train.py" + command("sft", f"{batch} {words}")[22:])
    config = yaml.safe_load(found.text)
    assert config["launch"] == {"processes": 4, **launch}
    trainer = config["stages"]["sft"]["trainer"]
    assert (trainer["per_device_train_batch_size"], trainer["gradient_accumulation_steps"]) == (2, 32)
    assert notes(found, "not supported") == []
    said = "`gradient_accumulation_steps` is 8 × 4 processes: here a step is that of all processes"
    assert said in notes(found, "differs")
    alone, _ = written(command("sft", f"{batch} {words}"))
    assert "launch" not in yaml.safe_load(alone.text)
    strategy = launch["strategy"]
    text = f"the command does not say how many GPUs train; write `launch: {{processes: N, strategy: {strategy}}}`"
    assert notes(alone, "to do") == [text]


@pytest.mark.parametrize(
    ("settings", "launch"),
    [
        ({"zero_optimization": None}, {}),
        ({"zero_optimization": True}, {}),
        ({"zero_optimization": {"stage": 3, "offload_optimizer": None}}, {"strategy": "zero3"}),
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": None}}}, {"strategy": "zero3"}),
    ],
)
def test_a_null_in_the_file_of_deepspeed_is_a_setting_that_is_not_there(folder, settings, launch):
    Path("own.json").write_text(json.dumps(settings), encoding="utf-8")
    words = command("sft", "--deepspeed own.json")[22:]
    found, _ = written(f"torchrun --nproc_per_node 4 src/train.py{words}")
    assert yaml.safe_load(found.text)["launch"] == {"processes": 4, **launch}
    unread = "`deepspeed: own.json` cannot be read here; write `launch: {strategy: zero2}` or `zero3`"
    assert (unread in notes(found, "to do")) == (not launch)


def test_visible_devices_are_processes(folder):
    found, _ = written("CUDA_VISIBLE_DEVICES=0,1,2 " + command("sft", ""))
    assert "launch: {processes: 3}\n" in found.text
    found, _ = written("NNODES=2 " + command("sft", ""))
    assert notes(found, "not supported") == ["2 machines: a run uses one machine"]
    found, _ = written("FORCE_TORCHRUN=1 " + command("sft", ""))
    assert notes(found, "to do")[0].startswith("`FORCE_TORCHRUN=1` starts a process on every GPU")


def test_what_a_script_does_besides_is_noted(folder):
    Path("run.sh").write_text(
        f"pip install trl llamafactory\nfor i in 1 2; do\n{command('sft', '')}\ndone\npython clean.py\necho done\n",
        encoding="utf-8",
    )
    found, _ = written("run.sh")
    assert "`for`: control flow of the shell is not followed; commands in it are read once" in notes(found, "differs")
    assert "`python …`: it starts no training" in notes(found, "not needed")
    found, pipeline = written(f"for i in 1 2; do {command('sft', '--seed $i')}; done")
    assert list(stages(pipeline)) == ["sft"]
    found, _ = written("accelerate launch --config_file fsdp.yaml src/train.py" + command("sft", "")[22:])
    assert notes(found, "not supported") == [
        "`--config_file fsdp.yaml`: accelerate's file is not read; write `launch: {processes: N, strategy: …}`"
    ]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("x.yaml", "a: 1\n", "x.yaml: the keys are those of no known program (LLaMA-Factory, Axolotl, TRL, "
         "alignment-handbook); name the file that its train command gets"),
        ("x.yaml", "model: m\nstages: {}\n", "x.yaml: is a config of this program already; `pipeline plan x.yaml` "
         "reads it"),
        ("x.yaml", "distributed_type: FSDP\nnum_processes: 8\n", "x.yaml: is a config of accelerate; name the file "
         "that its train command gets"),
        ("x.sh", "echo hello\n", "x.sh: there is no training command here; LLaMA-Factory, Axolotl, TRL, "
         "alignment-handbook and MedicalGPT are known"),
        ("x.sh", "llamafactory-cli train --a 'b\n", "x.sh: the command cannot be read (No closing quotation); close "
         "the quotation marks"),
    ],
)  # fmt: skip
def test_what_cannot_be_converted_is_one_sentence(folder, name, text, message):
    Path(name).write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        written(name)
    assert str(caught.value) == message


def test_a_missing_file_is_said(folder):
    with pytest.raises(ConfigError, match=r"nothing\.yaml: cannot be read"):
        written("nothing.yaml")
    with pytest.raises(ConfigError, match=r"nothing\.sh: cannot be read"):
        written("nothing.sh")
