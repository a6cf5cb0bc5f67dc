"""Configs of Axolotl, TRL and alignment-handbook, and commands of MedicalGPT."""

import contextlib
from pathlib import Path

import pytest
import yaml
from converted import COMMIT, notes, stages, written

from pipeline.errors import ConfigError
from pipeline.tools import convert_axolotl_arguments as axolotl
from pipeline.tools import convert_llamafactory_arguments as llamafactory
from pipeline.tools import convert_trl as trl
from pipeline.tools.convert import convert


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def made(text, name="x.yaml"):
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_text(text, encoding="utf-8")
    found, pipeline = written(name)
    return found, pipeline, next(iter(stages(pipeline).values()))


# Axolotl


AXOLOTL = """\
base_model: NousResearch/Meta-Llama-3-8B
model_type: LlamaForCausalLM
tokenizer_type: AutoTokenizer
datasets:
  - path: org/alpaca_2k
    type: alpaca
dataset_prepared_path:
val_set_size: 0.05
output_dir: ./outputs/lora-out
sequence_len: 4096
sample_packing: true
pad_to_sequence_len: true
adapter: lora
lora_model_dir:
lora_r: 32
lora_alpha: 16
lora_dropout: 0.05
lora_target_linear: true
wandb_project:
gradient_accumulation_steps: 4
micro_batch_size: 2
num_epochs: 4
optimizer: adamw_torch
lr_scheduler: cosine
learning_rate: 0.0002
train_on_inputs: false
bf16: auto
tf32: false
gradient_checkpointing: true
resume_from_checkpoint:
logging_steps: 1
flash_attention: true
warmup_ratio: 0.1
evals_per_epoch: 4
saves_per_epoch: 1
weight_decay: 0.0
special_tokens:
  pad_token: <|end_of_text|>
"""


def test_an_axolotl_config():
    found, pipeline, stage = made(AXOLOTL)
    assert (stage.use, stage.start) == ("sft", f"NousResearch/Meta-Llama-3-8B@{COMMIT}")
    assert stage.config.lora == {"r": 32, "lora_alpha": 16, "lora_dropout": 0.05}
    assert stage.config.eval_size == 0.05
    assert stage.config.trainer == {
        **{"max_length": 4096, "packing": True, "learning_rate": 2e-4, "lr_scheduler_type": "cosine"},
        **{"warmup_steps": 0.1, "num_train_epochs": 4, "per_device_train_batch_size": 2, "logging_steps": 1},
        **{"gradient_accumulation_steps": 4, "gradient_checkpointing": True, "weight_decay": 0, "optim": "adamw_torch"},
        **{"save_steps": 0.25, "eval_strategy": "steps", "eval_steps": 0.0625, "tf32": False},
        "model_init_kwargs": {"attn_implementation": "flash_attention_2"},
    }
    assert pipeline.data["alpaca_2k"].path == f"org/alpaca_2k@{COMMIT}"
    assert stage.template == found.files[Path("alpaca.jinja")]  # rows of `type: alpaca` are written in Alpaca's form
    assert notes(found, "not supported", "unknown", "to do") == []


DATASET = "  - path: org/alpaca_2k\n    type: alpaca\n"
CHAT = """\
  - path: org/chats
    type: chat_template
    split: train[:20%]
    field_messages: conversations
    message_property_mappings: {role: from, content: value}
    roles: {user: [human], assistant: [bot]}
"""
PAIRS = "  - path: org/pairs\n    type: chatml.intel\n"


@pytest.mark.parametrize(
    ("datasets", "more", "kind", "source"),
    [
        (CHAT, "", "sft",
         {"format": "messages", "columns": {"messages": "conversations"}, "roles": {"assistant": "bot"}}),
        ("  - path: data/x.jsonl\n    type: completion\n    field: body\n", "", "pt",
         {"path": "data/x.jsonl", "format": "text", "columns": {"text": "body"}}),
        ("  - path: json\n    data_files: data/y.json\n    type: sharegpt\n", "", "sft",
         {"path": "data/y.json", "format": "sharegpt"}),
        (PAIRS, "rl: dpo\nchat_template: chatml\n", "dpo", {"format": "preference", "columns": {"prompt": "question"}}),
        (PAIRS, "rl: ipo\nrl_beta: 0.2\nchat_template: chatml\n", "dpo", {"format": "preference"}),
        ("  - path: org/pairs\n    type: chat_template.default\n    field_messages: talk\n    field_chosen: better\n",
         "rl: dpo\n", "dpo", {"columns": {"conversations": "talk", "chosen": "better"}}),
        ("  - path: org/thumbs\n    type: llama3.ultra\n", "rl: kto\n", "kto", {"format": "labelled"}),
        ("  - path: org/pairs\n    type: bradley_terry.chat_template\n", "reward_model: true\n", "reward",
         {"format": "preference"}),
    ],
)  # fmt: skip
def test_types_of_axolotl(datasets, more, kind, source):
    text = AXOLOTL.replace(DATASET, datasets).replace("sample_packing: true", "sample_packing: false") + more
    found, pipeline, stage = made(text)
    assert stage.use == kind
    read = next(iter(pipeline.data.values()))
    assert {name: getattr(read, name) for name in source} == source
    if "ipo" in more:
        assert (stage.config.trainer["loss_type"], stage.config.trainer["beta"]) == ("ipo", 0.2)
    if "train[" in datasets:
        assert notes(found, "to do") == ["`split: train[:20%]`: a part of a split is written as `max_samples`"]


def test_what_axolotl_has_and_this_has_not():
    more = "load_in_4bit: true\ndeepspeed: z3.json\nplugins: [axolotl.integrations.liger.LigerPlugin]\nsample_pack: 1\n"
    found, _, stage = made(AXOLOTL.replace("adapter: lora", "adapter: qlora") + more)
    assert (stage.config.lora["r"], stage.config.quantized_base) == (32, "nf4")
    said = notes(found, "not supported")
    assert [text.partition("`: ")[0] for text in said] == [
        "`plugins: ['axolotl.integrations.liger.LigerPlugin']",
    ]
    assert notes(found, "unknown") == ["`sample_pack` is no argument of this program; did you mean `sample_packing`?"]
    with pytest.raises(ConfigError, match="`rl: orpo` is not supported; no stage is written for it"):
        made(AXOLOTL + "rl: orpo\n")


def test_axolotl_commands_are_a_chain():
    Path("x.yaml").write_text(AXOLOTL, encoding="utf-8")
    script = "accelerate launch -m axolotl.cli.train x.yaml --learning-rate 1e-5\n"
    script += "axolotl merge-lora x.yaml --lora-model-dir=./outputs/lora-out\n"
    Path("run.sh").write_text(script, encoding="utf-8")
    _, pipeline = written("run.sh")
    made = stages(pipeline)
    assert {name: stage.start for name, stage in made.items()} == {
        "sft": f"NousResearch/Meta-Llama-3-8B@{COMMIT}",
        "merge": "$sft",
    }
    assert made["sft"].config.trainer["learning_rate"] == 1e-5


# TRL and alignment-handbook


ZEPHYR = """\
model_name_or_path: org/zephyr-sft
torch_dtype: bfloat16
use_peft: true
load_in_4bit: true
lora_r: 16
lora_alpha: 16
lora_dropout: 0.05
lora_target_modules:
- q_proj
- k_proj
dataset_mixer:
  org/ultrafeedback: 1.0
dataset_splits:
- train_prefs
- test_prefs
preprocessing_num_workers: 12
bf16: true
beta: 0.01
do_eval: true
evaluation_strategy: steps
eval_steps: 100
hub_model_id: zephyr-7b-dpo-qlora
learning_rate: 5.0e-6
log_level: info
lr_scheduler_type: cosine
max_length: 1024
max_prompt_length: 512
optim: adamw_torch
output_dir: data/zephyr
push_to_hub: true
save_strategy: "no"
warmup_ratio: 0.1
"""


def test_a_recipe_of_alignment_handbook():
    found, pipeline, stage = made(ZEPHYR, "recipes/zephyr/dpo/config_qlora.yaml")
    assert (stage.use, stage.config.quantized_base) == ("dpo", "nf4")
    assert stage.config.lora == {
        **{"r": 16, "lora_alpha": 16, "lora_dropout": 0.05, "target_modules": ["q_proj", "k_proj"]}
    }
    assert stage.config.trainer == {
        **{"max_length": 1024, "beta": 0.01, "learning_rate": 5e-6, "lr_scheduler_type": "cosine", "warmup_steps": 0.1},
        **{"optim": "adamw_torch", "bf16": True, "save_strategy": "no", "eval_strategy": "steps", "eval_steps": 100},
        **{"dataset_num_proc": 12, "model_init_kwargs": {"dtype": "bfloat16"}},
    }
    assert [(source.path, source.split) for source in pipeline.data.values()] == [
        (f"org/ultrafeedback@{COMMIT}", "train_prefs"),
        (f"org/ultrafeedback@{COMMIT}", "test_prefs"),
    ]
    assert [source.split for source in stage.config.eval_data] == ["test_prefs"]
    assert [text.partition(":")[0] for text in notes(found, "not supported")] == [
        *("`hub_model_id", "`push_to_hub"),
    ]


MIXTURE = """\
model_name_or_path: org/base
model_revision: main
attn_implementation: flash_attention_2
chat_template: "{% for message in messages %}{{ message['content'] + eos_token }}{% endfor %}"
dataset_mixture:
  datasets:
    - id: org/talk
      config: Mid
      split: train_sft
      columns: [messages]
      weight: 1.0
    - id: org/more
      columns: [messages]
      weight: 0.25
  test_split_size: 100
  seed: 0
eval_strategy: epoch
max_seq_length: 2048
packing: true
learning_rate: 2.0e-05
report_to: [tensorboard]
use_liger_kernel: true
"""


def test_a_mixture_of_alignment_handbook():
    found, _pipeline, stage = made(MIXTURE, "recipes/x/sft/config.yaml")
    assert stage.use == "sft"
    assert [(source.path, source.subset, source.split) for source in stage.config.data.sources] == [
        (f"org/talk@{COMMIT}", "Mid", "train_sft"),
        (f"org/more@{COMMIT}", None, None),
    ]
    assert stage.config.eval_size == 100
    assert stage.config.lora is None
    assert stage.template == "{% for message in messages %}{{ message['content'] + eos_token }}{% endfor %}"
    assert stage.config.trainer["model_init_kwargs"] == {
        "attn_implementation": "flash_attention_2",
        "use_kernels": True,
    }
    assert "`more`: a share of 0.25 of its rows is used there; write that as `max_samples`" in notes(found, "to do")
    assert notes(found, "differs") == [
        "TRL trains every token of a conversation without `assistant_only_loss`; `sft` trains the answers alone"
    ]


@pytest.mark.parametrize(
    ("command", "kind", "lora"),
    [
        ("trl sft --dataset_name org/talk --use_peft --lora_r 32 --lora_alpha 16 --packing", "sft", (32, 16)),
        ("trl dpo --dataset_name org/pairs --use_peft --beta 0.2", "dpo", (16, 32)),
        ("trl kto --dataset_name org/thumbs --per_device_train_batch_size 4", "kto", None),
        ("python trl/scripts/reward.py --dataset_name org/pairs --dataset_config zh", "reward", None),
        ("accelerate launch --num_processes 8 trl/scripts/sft.py --dataset_name org/talk", "sft", None),
        ("trl sft --dataset_name org/books --dataset_text_field text", "pt", None),
    ],
)
def test_commands_of_trl(command, kind, lora):
    found, pipeline = written(f"{command} --model_name_or_path org/base --learning_rate 2e-4 --output_dir out")
    stage = stages(pipeline)[kind]
    assert stage.config.trainer["learning_rate"] == 2e-4
    assert (stage.config.lora and (stage.config.lora["r"], stage.config.lora["lora_alpha"])) == lora
    assert ("launch: {processes: 8}" in found.text) == ("--num_processes 8" in command)


def test_a_model_without_its_owner_and_texts_that_are_not_packed():
    text = "model_name_or_path: gpt2\ndataset_mixer: {org/books: 1.0}\nlearning_rate: 1e-4\n"
    found, _, stage = made(text, "recipes/gpt2/cpt/config.yaml")
    assert stage.use == "pt"
    assert stage.config.trainer["packing"] is False  # as in TRL; `pt` packs otherwise
    assert notes(found, "to do")[-1] == (
        "`gpt2` is neither a folder here nor a name on the Hub with its owner, `owner/gpt2`; write either"
    )


# MedicalGPT


MEDICAL = r"""
CUDA_VISIBLE_DEVICES=0,1 torchrun --nproc_per_node 2 pretraining.py --model_name_or_path Qwen/Qwen2.5-0.5B \
    --train_file_dir ./data/pretrain --validation_file_dir ./data/pretrain --per_device_train_batch_size 4 --do_train \
    --do_eval --use_peft True --seed 42 --max_train_samples 10000 --max_eval_samples 10 --num_train_epochs 0.5 \
    --learning_rate 2e-4 --warmup_ratio 0.05 --logging_steps 10 --eval_steps 50 --eval_strategy steps \
    --block_size 512 --packing True --output_dir outputs-pt --overwrite_output_dir --target_modules all \
    --lora_rank 8 --lora_alpha 16 --torch_dtype bfloat16 --bf16 --device_map auto --report_to tensorboard
python merge_peft_adapter.py --base_model Qwen/Qwen2.5-0.5B --lora_model outputs-pt --output_dir merged-pt
torchrun --nproc_per_node 2 supervised_finetuning.py --model_name_or_path merged-pt --train_file_dir ./data/finetune \
    --template_name qwen --use_peft True --output_dir outputs-sft --bf16 --do_train
python dpo_training.py --model_name_or_path merged-pt --peft_path outputs-sft --template_name qwen \
    --train_file_dir ./data/reward --max_source_length 1024 --max_target_length 512 --max_steps 100 \
    --output_dir outputs-dpo
"""


def test_scripts_of_medicalgpt_are_a_chain():
    Path("run.sh").write_text(MEDICAL, encoding="utf-8")
    found, pipeline = written("run.sh")
    made = stages(pipeline)
    assert {name: stage.start for name, stage in made.items()} == {
        **{"pt": f"Qwen/Qwen2.5-0.5B@{COMMIT}", "merge": "$pt", "sft": "$merge", "dpo": "$sft"},
    }
    assert [made[name].config.lora for name in ("pt", "sft", "dpo")] == [
        {"r": 8, "lora_alpha": 16, "lora_dropout": 0.05},
        {"r": 8, "lora_alpha": 32, "lora_dropout": 0.05},
        {"r": 8, "lora_alpha": 16, "lora_dropout": 0.05},
    ]
    assert [made[name].config.eval_size for name in ("pt", "sft", "dpo")] == [10, 0.01, 0.01]
    assert [made[name].config.trainer["max_length"] for name in ("pt", "sft", "dpo")] == [512, 512, 1536]
    trainer = made["dpo"].config.trainer
    defaults = {"learning_rate": 5e-4, "warmup_steps": 100, "weight_decay": 0.05, "max_steps": 100, "fp16": True}
    assert {name: trainer[name] for name in defaults} == defaults
    assert {name: (source.format, source.columns) for name, source in pipeline.data.items()} == {
        "pretrain": ("text", {}),
        "finetune": ("sharegpt", {}),
        "reward": ("preference", {"prompt": "question", "chosen": "response_chosen", "rejected": "response_rejected"}),
    }
    assert [made[name].launch.processes for name in ("pt", "sft", "dpo")] == [2, 2, 1]
    assert notes(found, "unknown", "not supported") == []


def test_secrets_are_not_repeated():
    command = "WANDB_API_KEY=abc123 llamafactory-cli train --do_train --model_name_or_path org/m --dataset d"
    found, _ = written(f"{command} --hf_hub_token hf_xyz --swanlab_lark_webhook_url https://hook/456 --use_galore true")
    everything = found.text + "".join(map(str, found.notes))
    assert not any(secret in everything for secret in ("abc123", "hf_xyz", "456"))
    assert found.text.startswith("# Converted from a command line.\n")


BASES = {
    "llamafactory": (
        llamafactory,
        "model_name_or_path: org/m\nstage: sft\ndo_train: true\ndataset: a\nval_size: 0.1\n",
    ),
    "axolotl": (axolotl, AXOLOTL),
    "trl": (trl, ZEPHYR),
}


@pytest.mark.parametrize("program", BASES)
def test_a_value_of_the_wrong_kind_is_no_internal_error(program):
    module, text = BASES[program]
    base = yaml.safe_load(text)
    for name in sorted(module.KNOWN.taken):
        Path("x.yaml").write_text(yaml.safe_dump({**base, name: {"a": [1]}}), encoding="utf-8")
        with contextlib.suppress(ConfigError):
            convert(["x.yaml"], Path("out.yaml"), commit_of=lambda *_: COMMIT)


# What the example configs of these programs showed


def test_a_name_on_the_hub_may_hold_dots():
    rows = "datasets: [{path: org/chat-3.1-2k, type: chat_template, split: train}]"
    _, pipeline, _ = made(f"base_model: org/m\n{rows}\nsequence_len: 64\nmicro_batch_size: 1\n")
    assert pipeline.data["chat-3_1-2k"].path == f"org/chat-3.1-2k@{COMMIT}"
    recipe = (
        "model_name_or_path: org/m\ndataset_name: org/chat-3.1-2k\ndataset_train_split: train_sft\nuse_peft: true\n"
    )
    _, pipeline, _ = made(recipe, "sft/config.yaml")
    assert (pipeline.data["chat-3_1-2k_train_sft"].path, pipeline.data["chat-3_1-2k_train_sft"].split) == (
        f"org/chat-3.1-2k@{COMMIT}",
        "train_sft",
    )


def test_a_file_of_a_data_set_on_the_hub_is_something_to_do():
    rows = "datasets:\n  - path: org/rows\n    data_files: [part/one.json]\n    type: alpaca"
    found, _, _ = made(f"base_model: org/m\n{rows}\nsequence_len: 64\nmicro_batch_size: 1\n")
    assert (
        "`part/one.json` is a file of `org/rows` on the Hub; `hf download org/rows part/one.json --repo-type dataset` "
        "fetches it; write its path under `data`"
    ) in notes(found, "to do")


@pytest.mark.parametrize("method", ["orpo", "grpo"])
def test_a_recipe_of_a_method_without_a_stage_is_no_dpo(method):
    text = "model_name_or_path: org/m\ndataset_name: org/pairs\nbeta: 0.05\nmax_prompt_length: 512\n"
    with pytest.raises(ConfigError, match=f"`{method}` is not supported; no stage is written for it"):
        made(text, f"zephyr/{method}/config_full.yaml")


def test_numbers_with_underscores_and_a_mapping_of_optimizer_arguments():
    more = "sequence_len: 500_000\nmicro_batch_size: 1\noptim_args: {bf16_stochastic_round: true, k: 2}\n"
    _, _, stage = made(f"base_model: org/m\ndatasets: [{{path: org/d, type: alpaca}}]\n{more}")
    trainer = stage.config.trainer
    assert (trainer["max_length"], trainer["optim_args"]) == (500_000, "bf16_stochastic_round=True,k=2")


def test_a_constant_schedule_has_no_warmup():
    more = "sequence_len: 64\nmicro_batch_size: 1\nlr_scheduler: constant\nwarmup_ratio: 0.1\n"
    found, _, stage = made(f"base_model: org/m\ndatasets: [{{path: org/d, type: alpaca}}]\n{more}")
    assert "warmup_steps" not in stage.config.trainer
    text = "`warmup_ratio`: the schedule `constant` has no warmup; `constant_with_warmup` has one"
    assert text in notes(found, "not needed")


def test_arguments_of_axolotl_are_known():
    more = (
        "sequence_len: 64\nmicro_batch_size: 1\nprocessor_type: AutoProcessor\nskip_prepare_dataset: true\n"
        "use_ray: true\nuse_kernels: true\nfloat16: true\nuse_swanlab: true\nfp8: true\nrelora: true\n"
    )
    found, _, stage = made(f"base_model: org/m\ndatasets: [{{path: org/d, type: alpaca}}]\n{more}")
    assert notes(found, "unknown") == []
    assert stage.config.trainer["model_init_kwargs"] == {"dtype": "float16", "use_kernels": True}
    assert stage.config.trainer["report_to"] == "swanlab"
    assert [text.split("`")[1] for text in notes(found, "not supported")] == [
        "use_ray: true",
        "fp8: true",
        "relora: true",
    ]


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("tools/model_quant.py --unquantized_model_path m", "add a stage `quantize`, which writes GPTQ"),
        ("tools/eval_quantize.py --bnb_path m", "`eval_quantize.py` reads 4 bits of bitsandbytes"),
        ("training/opd_training.py --model_name_or_path m", "`opd` is not supported"),
    ],
)
def test_scripts_of_medicalgpt_without_a_stage_say_so(script, said):
    with pytest.raises(ConfigError, match=said):
        made(f"python {script}\n", "run.sh")
