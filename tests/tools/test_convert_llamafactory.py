"""LLaMA-Factory's config files: shapes like those of its examples, its defaults, and every argument that it has."""

from pathlib import Path

import pytest
from converted import COMMIT, notes, stages, written

from pipeline.cli import main
from pipeline.errors import ConfigError
from pipeline.tools import convert_llamafactory_arguments as tables

NAMES = """
template dataset eval_dataset dataset_dir media_dir cutoff_len train_on_prompt mask_history streaming
buffer_size mix_strategy interleave_probs overwrite_cache preprocessing_batch_size preprocessing_num_workers
max_samples eval_num_beams ignore_pad_token_for_loss val_size eval_on_each_dataset packing neat_packing
tool_format default_system enable_thinking preserve_thinking tokenized_path data_shared_file_system task
task_dir batch_size seed lang n_shot save_dir download_mode freeze_trainable_layers freeze_trainable_modules
freeze_extra_modules additional_target lora_alpha lora_dropout lora_rank lora_target loraplus_lr_ratio
loraplus_lr_embedding use_rslora use_dora pissa_init pissa_iter pissa_convert create_new_adapter module_dropout
oft_rank oft_block_size oft_target pref_beta pref_ftx pref_bco_weight pref_loss dpo_label_smoothing
kto_chosen_weight kto_rejected_weight simpo_gamma ppo_buffer_size ppo_epochs ppo_score_norm ppo_target
ppo_whiten_rewards ref_model ref_model_adapters ref_model_quantization_bit reward_model reward_model_adapters
reward_model_quantization_bit reward_model_type ld_alpha use_galore galore_target galore_rank
galore_update_interval galore_scale galore_proj_type galore_layerwise use_apollo apollo_target apollo_rank
apollo_update_interval apollo_scale apollo_proj apollo_proj_type apollo_scale_type apollo_layerwise
apollo_scale_front use_badam badam_mode badam_start_block badam_switch_mode badam_switch_interval
badam_update_ratio badam_mask_mode badam_verbose use_swanlab swanlab_project swanlab_workspace swanlab_run_name
swanlab_mode swanlab_api_key swanlab_logdir swanlab_lark_webhook_url swanlab_lark_secret pure_bf16 stage
finetuning_type use_llama_pro use_adam_mini use_mca use_hyper_parallel hyper_parallel_args use_muon use_dft_loss
use_asft_loss asft_alpha use_eaft_loss eaft_alpha freeze_vision_tower freeze_multi_modal_projector
freeze_language_model compute_accuracy disable_shuffling early_stopping_steps plot_loss
include_effective_tokens_per_second do_sample temperature top_p top_k num_beams max_length max_new_tokens
repetition_penalty length_penalty skip_special_tokens model_name_or_path adapter_name_or_path adapter_folder
cache_dir use_fast_tokenizer resize_vocab split_special_tokens add_tokens add_special_tokens
new_special_tokens_config init_special_tokens model_revision low_cpu_mem_usage rope_scaling flash_attn
shift_attn mixture_of_depths use_unsloth use_unsloth_gc enable_liger_kernel moe_aux_loss_coef
disable_gradient_checkpointing use_reentrant_gc upcast_layernorm upcast_lmhead_output train_from_scratch
infer_backend offload_folder use_kv_cache use_v1_kernels infer_dtype hf_hub_token ms_hub_token om_hub_token
print_param_status trust_remote_code quantization_method quantization_bit quantization_type double_quantization
quantization_device_map image_max_pixels image_min_pixels image_do_pan_and_scan crop_to_patches video_max_pixels
video_min_pixels video_fps video_maxlen use_audio_in_video audio_sampling_rate export_dir export_size
export_device export_quantization_bit export_quantization_dataset export_quantization_nsamples
export_quantization_maxlen export_legacy_format export_hub_model_id vllm_maxlen vllm_gpu_util vllm_enforce_eager
vllm_max_lora_rank vllm_config sglang_maxlen sglang_mem_fraction sglang_tp_size sglang_config
sglang_lora_backend use_kt kt_weight_path kt_expert_checkpoint_path kt_use_lora_experts kt_lora_expert_num
kt_lora_expert_intermediate_size ray_num_workers ray_init_kwargs master_addr master_port enable_torch_profiler
profiler_output_dir profiler_wait_steps profiler_warmup_steps profiler_active_steps profiler_repeat
profiler_record_shapes profiler_profile_memory profiler_with_stack profile_modules fp8 fp8_backend
fp8_enable_fsdp_float8_all_gather overwrite_output_dir
"""  # of LLaMA-Factory 0.9.5, `hparams/*.py`


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def config(text="", **changes):
    """A config file like those of its examples, with other values; None removes an argument."""
    given = {
        **{"model_name_or_path": "meta-llama/Meta-Llama-3-8B-Instruct", "trust_remote_code": True, "stage": "sft"},
        **{"do_train": True, "finetuning_type": "lora", "lora_rank": 8, "lora_target": "all"},
        **{"dataset": "identity,alpaca_en_demo", "template": "llama3", "cutoff_len": 2048, "max_samples": 1000},
        **{"overwrite_cache": True, "preprocessing_num_workers": 16, "dataloader_num_workers": 4},
        **{"output_dir": "saves/llama3-8b/lora/sft", "logging_steps": 10, "save_steps": 500, "plot_loss": True},
        **{"overwrite_output_dir": True, "save_only_model": False, "report_to": "none"},
        **{"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8, "learning_rate": "1.0e-4"},
        **{"num_train_epochs": 3.0, "lr_scheduler_type": "cosine", "warmup_ratio": 0.1, "bf16": True},
        **{"ddp_timeout": 180000000, "resume_from_checkpoint": None},
        **changes,
    }
    lines = [f"{name}: {str(value).lower() if isinstance(value, bool) else value}" for name, value in given.items()
             if value is not None]  # fmt: skip
    return "\n".join(["### model", *lines, text]) + "\n"


HELD = {"val_size": 0.1, "per_device_eval_batch_size": 1, "eval_strategy": "steps", "eval_steps": 500}
FULL = {"finetuning_type": "full", "lora_rank": None, "lora_target": None}
DPO = {"stage": "dpo", "dataset": "dpo_en_demo", "pref_beta": 0.1, "pref_loss": "sigmoid", "learning_rate": "5.0e-6"}
KTO = {"stage": "kto", "dataset": "kto_en_demo", "pref_beta": 0.1}
RM = {"stage": "rm", "dataset": "dpo_en_demo"}
PT = {"stage": "pt", "dataset": "c4_demo", "template": None}
ADAPTER = """\
model_name_or_path: meta-llama/Meta-Llama-3-8B-Instruct
adapter_name_or_path: saves/llama3-8b/lora/sft
template: llama3
trust_remote_code: true
"""
PREDICT = (
    ADAPTER
    + """\
stage: sft
do_predict: true
finetuning_type: lora
eval_dataset: identity,alpaca_en_demo
cutoff_len: 2048
max_samples: 50
overwrite_cache: true
preprocessing_num_workers: 16
output_dir: saves/llama3-8b/lora/predict
overwrite_output_dir: true
per_device_eval_batch_size: 1
predict_with_generate: true
ddp_timeout: 180000000
"""
)
EVAL = (
    ADAPTER.replace("template: llama3", "template: fewshot")
    + """\
finetuning_type: lora
task: mmlu_test
lang: en
n_shot: 5
save_dir: saves/llama3-8b/lora/eval
batch_size: 4
"""
)
EXPORT = "export_dir: output/x\nexport_size: 5\nexport_device: cpu\nexport_legacy_format: false\n"
GPTQ = (
    ADAPTER.replace("adapter_name_or_path: saves/llama3-8b/lora/sft\n", "")
    + EXPORT
    + """\
export_quantization_bit: 4
export_quantization_dataset: data/c4_demo.jsonl
"""
)
RAY = "ray_run_name: x\nray_storage_path: ./saves\nplacement_strategy: PACK\nresources_per_worker:\n  GPU: 1\n"
SHAPES = {  # a config → the stages, and the beginnings of what is said not to be supported
    **{f"{kind}_lora": (config(**more), [kind], []) for kind, more in
       {"pt": PT, "sft": {}, "dpo": DPO, "kto": KTO, "reward": RM}.items()},
    **{f"{kind}_held": (config(**more, **HELD), [kind], []) for kind, more in
       {"pt": PT, "sft": {}, "dpo": DPO, "kto": KTO, "reward": RM}.items()},
    **{f"{kind}_full_ds3": (config(**more | FULL, deepspeed="examples/deepspeed/ds_z3_config.json"), [kind],
                            []) for kind, more in
       {"pt": PT, "sft": {}, "dpo": DPO, "kto": KTO, "reward": RM}.items()},
    **{f"sft_{name}": (config(template=name), ["sft"], []) for name in
       ("qwen", "qwen3", "qwen3_nothink", "gemma", "mistral", "default", "chatml", "glm4", "alpaca", "phi4")},
    "dpo_orpo": (config(**DPO | {"pref_loss": "orpo"}), ["dpo"], ["`pref_loss: orpo`: this loss"]),
    "dpo_ftx": (config(**DPO, pref_ftx=0.5), ["dpo"], []),
    "dpo_hinge": (config(**DPO | {"pref_loss": "hinge"}), ["dpo"], []),
    "dpo_ref": (config(**DPO, ref_model="org/other"), ["dpo"], ["`ref_model: org/other`: the reference is always"]),
    "sft_bnb": (config(quantization_bit=4, quantization_method="bnb", double_quantization=False), ["sft"], []),
    "sft_8bit": (config(quantization_bit=8), ["sft"], []),
    "sft_3bit": (config(quantization_bit=3, quantization_method="hqq"), ["sft"], ["`quantization_bit: 3`: a base is"]),
    "sft_no_bit": (config("quantization_bit: null"), ["sft"], []),
    "sft_gptq": (config(model_name_or_path="TechxGenus/Meta-Llama-3-8B-Instruct-GPTQ"), ["sft"], []),
    "sft_ray": (config(RAY, dataset_dir="REMOTE:llamafactory/demo_data", ray_num_workers=4), ["sft"],
                ["`ray_num_workers: 4`: Ray"]),
    "sft_online": (config(dataset_dir="ONLINE", dataset="llamafactory/tiny-supervised-dataset"), ["sft"], []),
    "sft_fsdp": (config(fsdp="full_shard auto_wrap"), ["sft"], []),
    "galore": (config(**FULL, use_galore=True, galore_layerwise=True, galore_target="mlp,self_attn", galore_rank=128,
                      galore_scale=2.0, pure_bf16=True, bf16=None), ["sft"], ["`use_galore: true`: GaLore"]),
    "apollo": (config(**FULL, use_apollo=True, apollo_rank=256), ["sft"], ["`use_apollo: true`: APOLLO"]),
    "badam": (config(**FULL, use_badam=True, badam_mode="layer"), ["sft"], ["`use_badam: true`: BAdam"]),
    "adam_mini": (config(**FULL, use_adam_mini=True), ["sft"], ["`use_adam_mini: true`: Adam-mini"]),
    "muon": (config(**FULL, use_muon=True), ["sft"], ["`use_muon: true`: Muon"]),
    "dft": (config(**FULL, use_dft_loss=True), ["sft"], ["`use_dft_loss: true`: this loss"]),
    "asft": (config(use_asft_loss=True, asft_alpha=0.1), ["sft"], ["`use_asft_loss: true`: this loss"]),
    "eaft": (config(use_eaft_loss=True, eaft_alpha=1.0), ["sft"], ["`use_eaft_loss: true`: this loss"]),
    "freeze": (config(**FULL | {"finetuning_type": "freeze"}, freeze_trainable_layers=8, use_llama_pro=True), ["sft"],
               ["`finetuning_type: freeze`: LoRA is written", "`use_llama_pro: true`: expanded blocks"]),
    "oft": (config(**FULL | {"finetuning_type": "oft"}, oft_block_size=32, oft_target="all"), ["sft"],
            ["`finetuning_type: oft`: LoRA is written"]),
    "loraplus": (config(loraplus_lr_ratio=16.0), ["sft"], ["`loraplus_lr_ratio: 16.0`: LoRA+"]),
    "pissa": (config(pissa_init=True, pissa_iter=16, pissa_convert=True), ["sft"], ["`pissa_init: true`: PiSSA"]),
    "dora": (config(use_dora=True, use_rslora=True), ["sft"], []),
    "mod": (config(**FULL, mixture_of_depths="convert", optim="paged_adamw_8bit", pure_bf16=True), ["sft"],
            ["`mixture_of_depths: convert`: mixture"]),
    "longlora": (config(shift_attn=True, rope_scaling="linear"), ["sft"],
                 ["`shift_attn: true`: LongLoRA", "`rope_scaling: linear`: positions"]),
    "kernels": (config(flash_attn="fa2", enable_liger_kernel=True, use_unsloth_gc=True), ["sft"],
                ["`use_unsloth_gc: true`: unsloth"]),
    "fp8": (config(**FULL, **HELD, fp8=True, fp8_backend="te", do_eval=True), ["sft"], ["`fp8: true`: training"]),
    "tokens": (config(resize_vocab=True, new_special_tokens_config="t.yaml", init_special_tokens="desc_init"), ["sft"],
               []),
    "preprocess": (config(tokenized_path="saves/llama3-8b/dataset/sft"), ["sft"], []),
    "neat": (config(neat_packing=True), ["sft"], []),
    "streaming": (config(streaming=True, max_steps=100, max_samples=None, mix_strategy="interleave_under",
                         interleave_probs="0.7,0.3", buffer_size=128), ["sft"], []),
    "early": (config(**HELD, early_stopping_steps=3, load_best_model_at_end=True, metric_for_best_model="eval_accuracy",
                     compute_accuracy=True), ["sft"], []),
    "push": (config(push_to_hub=True, hub_model_id="me/x"), ["sft"],
             ["`push_to_hub: true`: a run uploads nothing", "`hub_model_id: me/x`: a run uploads nothing"]),
    "profiler": (config(enable_torch_profiler=True, profiler_repeat=2), ["sft"], ["`enable_torch_profiler: true`:"]),
    "swanlab": (config(use_swanlab=True, swanlab_project="p", swanlab_run_name="r"), ["sft"], []),
    "mask": (config(mask_history=True), ["sft"], ["`mask_history: true`: `sft` trains every answer"]),
    "prompt": (config(train_on_prompt=True), ["sft"], ["`train_on_prompt: true`: `sft` trains the answers alone"]),
    "thinking": (config(template="qwen3", enable_thinking=False, default_system="Be kind."), ["sft"], []),
    "mllm_template": (config(template="qwen2_vl", image_max_pixels=262144, freeze_vision_tower=True), ["sft"], []),
    "train_and_predict": (config(eval_dataset="identity", predict_with_generate=True), ["sft", "evaluate"], []),
    "predict": (PREDICT, ["evaluate", "evaluate_2"], []),
    "full_predict": (PREDICT.replace("adapter_name", "# adapter_name").replace("eval_dataset", "dataset"),
                     ["evaluate", "evaluate_2"], []),
    "eval": (EVAL, ["evaluate"], []),
    "ceval": (EVAL.replace("mmlu_test", "ceval_validation"), ["evaluate"], []),
    "merge": (ADAPTER + EXPORT, ["merge"], []),
    "merge_full": (ADAPTER.replace("adapter_name", "# adapter_name") + EXPORT, ["merge"], []),
    "gptq": (GPTQ, ["quantize"], []),
    "chat": (ADAPTER + "infer_backend: huggingface  # choices\n", ["evaluate"], []),
    "vllm": (ADAPTER.replace("adapter_name", "# adapter_name") + "infer_backend: vllm\nvllm_enforce_eager: true\n",
             ["evaluate"], []),
    "sglang": (ADAPTER.replace("adapter_name", "# adapter_name") + "infer_backend: sglang\n", ["evaluate"], []),
}  # fmt: skip


@pytest.mark.parametrize("name", SHAPES)
def test_a_config_like_its_examples_becomes_one_that_validates(name):
    text, kinds, unsupported = SHAPES[name]
    Path(f"{name}.yaml").write_text(text, encoding="utf-8")
    found, pipeline = written(f"{name}.yaml")
    assert [stage for stage in stages(pipeline) if stage != "add_tokens"] == kinds
    said = notes(found, "not supported", "unknown")
    assert len(said) == len(unsupported)
    assert all(text.startswith(start) for text, start in zip(sorted(said), sorted(unsupported), strict=True)), said


@pytest.mark.parametrize(
    ("changes", "reasons"),
    [
        ({"stage": "ppo", "reward_model": "saves/reward"},
         ["not supported: `stage: ppo`: no stage is written for it",
          "not supported: `reward_model: saves/reward`: reinforcement learning (PPO) is not supported"]),
        ({"stage": "orpo"}, ["not supported: `stage: orpo`: no stage is written for it"]),
    ],
)  # fmt: skip
def test_a_config_of_which_nothing_is_left_says_why(changes, reasons):
    Path("x.yaml").write_text(config(**changes), encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        written("x.yaml")
    first, *others = str(caught.value).splitlines()
    assert first == "x.yaml: no stage can be written"
    assert [line.partition(": ")[2] for line in others] == reasons


# Defaults and settings


def made(**changes):
    Path("x.yaml").write_text(config(**changes), encoding="utf-8")
    found, pipeline = written("x.yaml")
    return found, next(stage for name, stage in stages(pipeline).items() if name != "add_tokens")


BARE = dict.fromkeys(
    ("cutoff_len", "learning_rate", "lora_rank", "lora_target", "template", "bf16", "warmup_ratio", "num_train_epochs")
)


def test_its_defaults_are_written_where_they_differ():
    found, stage = made(**BARE)
    assert stage.config.lora == {"r": 8, "lora_alpha": 16}
    trainer = stage.config.trainer
    assert {name: trainer[name] for name in ("max_length", "learning_rate", "bf16")} == {
        **{"max_length": 2048, "learning_rate": 5e-5, "bf16": False}
    }
    assert "learning_rate: 5e-5                       # the default there\n" in found.text
    assert stage.config.eval_size == 0
    _, stage = made(**{**PT, **BARE})
    assert (stage.config.trainer["packing"], stage.config.trainer["packing_strategy"]) == (True, "wrapped")
    _, stage = made(**{**PT, "packing": False})
    assert stage.config.trainer["packing"] is False
    assert "packing_strategy" not in stage.config.trainer
    _, stage = made(**{**RM, **BARE})
    assert stage.config.trainer["disable_dropout"] is False
    _, stage = made(lora_rank=4)
    assert stage.config.lora == {"r": 4, "lora_alpha": 8}


@pytest.mark.parametrize(
    ("changes", "settings"),
    [
        ({"warmup_ratio": 0.1}, {"warmup_steps": 0.1}),
        ({"warmup_ratio": 0.1, "warmup_steps": 20}, {"warmup_steps": 20}),
        ({"warmup_ratio": None, "warmup_steps": 0.1}, {"warmup_steps": 0.1}),
        ({"pure_bf16": True, "bf16": None}, {"bf16": False, "model_init_kwargs": {"dtype": "bfloat16"}}),
        ({"fp16": True, "bf16": None}, {"fp16": True, "model_init_kwargs": {"dtype": "float16"}}),
        ({**FULL, "fp16": True, "bf16": None}, {"fp16": True, "model_init_kwargs": None}),
        ({"flash_attn": "fa2"}, {"model_init_kwargs": {"attn_implementation": "flash_attention_2"}}),
        ({"flash_attn": "disabled"}, {"model_init_kwargs": {"attn_implementation": "eager"}}),
        ({"disable_gradient_checkpointing": True}, {"gradient_checkpointing": False}),
        ({"disable_shuffling": True}, {"train_sampling_strategy": "sequential"}),
        ({"group_by_length": True}, {"train_sampling_strategy": "group_by_length"}),
        ({"neftune_noise_alpha": 5}, {"neftune_noise_alpha": 5}),
        ({"neat_packing": True}, {"packing": True}),
        ({"report_to": "wandb", "run_name": "a"}, {"report_to": "wandb", "run_name": "a"}),
        ({"use_swanlab": True, "report_to": "wandb"}, {"report_to": ["wandb", "swanlab"]}),
        ({**HELD, "evaluation_strategy": "steps", "eval_strategy": None}, {"eval_strategy": "steps"}),
        ({**HELD, "eval_steps": None, "logging_steps": None}, {"eval_strategy": "steps", "logging_steps": 500}),
        ({**HELD, "load_best_model_at_end": True, "metric_for_best_model": "eval_accuracy"},
         {"metric_for_best_model": "mean_token_accuracy"}),
        ({**DPO, "pref_ftx": 0.5}, {"loss_type": ["sigmoid", "sft"], "loss_weights": [1, 0.5]}),
        ({**DPO, "pref_bco_weight": 0.25}, {"loss_type": ["sigmoid", "bco_pair"], "loss_weights": [0.8, 0.2]}),
        ({**DPO, "pref_bco_weight": 1, "pref_ftx": 0.5},
         {"loss_type": ["sigmoid", "sft", "bco_pair"], "loss_weights": [0.5, 0.5, 0.5]}),
        ({**DPO, "ld_alpha": 0.5}, {"ld_alpha": 0.5}),
        ({**DPO, "pref_beta": None, "dpo_beta": 0.3}, {"beta": 0.3}),  # the name of an earlier version
        ({**KTO, "kto_chosen_weight": 1.5}, {"desirable_weight": 1.5}),
        ({**KTO, **HELD}, {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4,
                           "per_device_eval_batch_size": 2}),
    ],
)  # fmt: skip
def test_an_argument_becomes_a_setting(changes, settings):
    _, stage = made(**changes)
    assert {name: stage.config.trainer.get(name) for name in settings} == settings


def test_lora_arguments():
    _, stage = made(lora_target="q_proj, v_proj", lora_dropout=0.1, lora_alpha=64, additional_target="embed_tokens",
                    use_rslora=True)  # fmt: skip
    assert stage.config.lora == {
        **{"r": 8, "lora_alpha": 64, "lora_dropout": 0.1, "target_modules": ["q_proj", "v_proj"]},
        **{"modules_to_save": ["embed_tokens"], "use_rslora": True},
    }
    _, stage = made(**FULL)
    assert stage.config.lora is None


def test_new_tokens():
    Path("t.yaml").write_text('"<a>": what it means\n"<b>": another\n', encoding="utf-8")
    found, _ = made(resize_vocab=True, new_special_tokens_config="t.yaml")
    assert 'add_tokens: ["<a>", "<b>"]\n' in found.text
    found, _ = made(add_tokens="幽门螺杆菌,高血压", add_special_tokens='"<c>"')
    assert 'add_tokens: {special: ["<c>"], words: [幽门螺杆菌, 高血压]}\n' in found.text
    found, _ = made(new_special_tokens_config="none.yaml")
    assert notes(found, "to do")[0] == "`none.yaml` is not found; write its tokens under `add_tokens`"


def test_mixing_and_held_out_data():
    found, stage = made(mix_strategy="interleave_under", interleave_probs="0.7,0.3", val_size=200)
    assert stage.config.data.weights == [0.7, 0.3]
    assert stage.config.eval_size == 200
    assert "data: {identity: 0.7, alpaca_en_demo: 0.3}" in found.text
    _, stage = made(eval_dataset="held")
    assert [source.path for source in stage.config.eval_data] == ["data/held.json"]
    found, stage = made(mix_strategy="interleave_over")
    assert stage.config.data.weights == [1, 1]
    assert notes(found, "differs")[0].startswith("`interleave_over` repeats rows")
    found, stage = made(**{**HELD, "val_size": None})
    assert "eval_strategy" not in stage.config.trainer
    assert "`eval_strategy: steps`: there are no held-out rows; add `eval_size: 0.05`" in notes(found, "differs")
    found, stage = made(**HELD, streaming=True, max_steps=10)
    assert stage.config.streaming is True
    assert notes(found, "not supported") == [
        "`val_size: 0.1`: a stream has no rows to hold out; name a file under `eval_data`"
    ]


def test_the_same_data_with_other_settings_gets_a_second_name():
    for name, more in {"a": {**PT, "dataset": "identity"}, "b": {"dataset": "identity", "max_samples": 5}}.items():
        Path(f"{name}.yaml").write_text(config(**more), encoding="utf-8")
    _, pipeline = written("a.yaml", "b.yaml")
    assert {name: (source.format, source.max_samples) for name, source in pipeline.data.items()} == {
        "identity": ("text", 1000),
        "identity_sft": ("alpaca", 5),
    }


def test_an_unknown_argument_is_named_with_the_nearest():
    found, _ = made(lerning_rate="1e-4", lora_ranks=4)
    assert notes(found, "unknown") == [
        "`lerning_rate` is no argument of this program; did you mean `learning_rate`?",
        "`lora_ranks` is no argument of this program; did you mean `lora_rank`?",
    ]
    found, _ = made(num_train_epochs="many")
    assert notes(found, "to do")[-1] == "`num_train_epochs` is `many`; SFTConfig wants a number (float)"


def test_hinge_is_trained_where_it_is_asked_for():
    found, stage = made(**DPO | {"pref_loss": "hinge"})
    assert stage.config.trainer["loss_type"] == "hinge"
    assert (
        "`pref_loss: hinge`: LLaMA-Factory 0.9.5 trains `sigmoid` whatever is asked; here `hinge` is trained"
        in notes(found, "differs")
    )


def differs(**changes):
    """The notes about differences of a command."""
    return notes(made(**changes)[0], "differs")


def test_losses_that_differ_are_noted():
    ending = "the line end after the token that ends an answer is in the loss of LLaMA-Factory and not in the loss here"
    assert differs() == []
    assert differs(template="chatml") == [f"`template: chatml`: {ending}"]
    assert differs(**DPO | {"template": "default"}) == [f"`template: default`: {ending}"]
    assert differs(**RM | {"template": "default"}) == []  # a reward model reads every token
    assert differs(template="glm4") == [
        "`template: glm4`: LLaMA-Factory ends the last answer of a conversation alone, here every answer ends"
    ]
    first = (
        "the loss of `pt` is smaller in LLaMA-Factory by one part in the tokens of a row: its transformers also counts "
        "the first token of a row, which is not predicted"
    )
    begin = (
        "where a tokenizer begins texts with BOS: here each text begins with it, in LLaMA-Factory only with "
        "`add_bos_token` and without packing"
    )
    rest = (
        "`packing: false`: LLaMA-Factory leaves out the rest of a text that is longer than `cutoff_len`, here the rest "
        "is trained"
    )
    assert differs(**PT, packing=False) == [first, begin, rest]
    assert differs(**PT) == [first, begin]
    assert differs(**PT | {"template": "qwen"}) == [
        first,
        begin,
        "`template: qwen`: LLaMA-Factory ends each text with the end token of this template, here the tokenizer's EOS "
        "ends it",
    ]


def test_losses_of_dpo_that_differ_are_noted():
    assert differs(**DPO, pref_ftx=0.5) == [
        "`pref_ftx: 0.5`: LLaMA-Factory takes the mean of each chosen answer first, here every token counts the same"
    ]
    assert differs(**DPO, pref_bco_weight=0.5) == [
        "`pref_bco_weight: 0.5`: LLaMA-Factory subtracts the running mean of the rewards, here nothing is subtracted"
    ]
    found, stage = made(**DPO, dpo_label_smoothing=0.1)
    assert "label_smoothing" not in stage.config.trainer
    assert notes(found, "not supported") == [
        "`dpo_label_smoothing: 0.1`: TRL's `sigmoid` has no label smoothing; `loss_type: robust` has another kind of it"
    ]


def test_generation_has_its_defaults():
    Path("x.yaml").write_text(PREDICT + "temperature: 0.5\n", encoding="utf-8")
    _, pipeline = written("x.yaml")
    evaluate = stages(pipeline)["evaluate"].config
    sampled = {"do_sample": True, "temperature": 0.5, "top_p": 0.7, "top_k": 50, "max_new_tokens": 1024}
    assert {name: getattr(evaluate.generation, name) for name in sampled} == sampled
    assert (list(evaluate.data), list(evaluate.prompts), evaluate.max_length) == (["identity"], ["identity"], 2048)
    assert pipeline.data["identity"].max_samples == 50
    Path("x.yaml").write_text(PREDICT + "do_sample: false\nmax_new_tokens: 9\n", encoding="utf-8")
    _, pipeline = written("x.yaml")
    generation = stages(pipeline)["evaluate"].config.generation
    assert (generation.do_sample, generation.max_new_tokens, generation.temperature) == (False, 9, 1.0)


# Every argument


@pytest.mark.parametrize("name", NAMES.split())
def test_every_argument_has_one_place(name):
    places = [name in table for table in (tables.SAME, tables.MADE, tables.NOT_NEEDED, tables.NOT_SUPPORTED)]
    assert sum(places) == 1 or (not any(places) and name in set(tables.KNOWN.names()))


def test_every_reason_is_one_sentence():
    for text in {*tables.NOT_NEEDED.values(), *tables.NOT_SUPPORTED.values()}:
        assert text == text.strip()
        assert not text.endswith(".")


# The whole way


def test_converted_commands_plan_on_real_files(project):
    """`validate` of the result finds nothing where the model and the data are there."""
    project.model("m", weights={"model.layers.0.self_attn.q_proj.weight": [8, 8]})
    project.write(
        "data/dataset_info.json",
        """{
        "books": {"file_name": "../books.jsonl", "columns": {"prompt": "text"}},
        "consult": {"file_name": "../consult.jsonl"},
        "prefer": {"file_name": "../prefer.jsonl", "ranking": true,
                   "columns": {"prompt": "prompt", "chosen": "chosen", "rejected": "rejected"}}}""",
    )
    project.write(
        "run.sh",
        """
        T="--do_train --finetuning_type lora --bf16 --cutoff_len 64"
        llamafactory-cli train $T --stage pt --model_name_or_path m --dataset books --output_dir a
        llamafactory-cli train $T --stage sft --model_name_or_path m --adapter_name_or_path a --dataset consult \\
            --template default --output_dir b
        llamafactory-cli train $T --stage dpo --model_name_or_path m --adapter_name_or_path b --dataset prefer \\
            --template default --output_dir c
        llamafactory-cli export --model_name_or_path m --adapter_name_or_path c --export_dir d
        """,
    )
    _, pipeline = written("run.sh", out="run.yaml")
    for stage in list(stages(pipeline).values())[:3]:
        assert (stage.config.trainer["max_length"], stage.config.trainer["bf16"]) == (64, True)
    code = main(["validate", "run.yaml"])
    shown = project.capsys.readouterr()
    assert (code, shown.err) == (0, "")
    assert "run.yaml: 4 stages (pt → sft → dpo → merge); books 2 rows, consult 1 rows, prefer 1 rows" in shown.out


def test_commit_is_asked_once_for_each_name():
    asked = []
    Path("x.yaml").write_text(config(dataset_dir="ONLINE", dataset="org/set"), encoding="utf-8")
    from pipeline.tools.convert import convert

    convert(["x.yaml"], Path("out.yaml"), commit_of=lambda kind, name: asked.append((kind, name)) or COMMIT)
    assert asked == [("dataset", "org/set"), ("model", "meta-llama/Meta-Llama-3-8B-Instruct")]


def test_a_setting_of_training_that_an_evaluation_does_not_use_is_no_unknown_word():
    text = config(
        do_train=False, predict_with_generate=True, dataset=None, eval_dataset="set", dataloader_num_workers=4
    )
    Path("x.yaml").write_text(text, encoding="utf-8")
    found, _ = written("x.yaml")
    assert notes(found, "unknown") == []
    assert "`dataloader_num_workers`: this stage does not use it" in notes(found, "not needed")
