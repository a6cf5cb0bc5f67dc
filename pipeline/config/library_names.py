"""Settings of the libraries that are not the user's to set, and names that other versions and tools use for them."""


def _by_name(table: dict[str, str]) -> dict[str, str]:
    return {name: text for text, names in table.items() for name in names.split()}


_FOLDER = "is set by the pipeline (every stage writes into its own folder); remove it"
_TRAINER_MANAGED = _by_name(
    {
        _FOLDER: "output_dir overwrite_output_dir logging_dir",
        "is set by the pipeline (a stopped stage goes on by itself); remove it": "resume_from_checkpoint",
        "is left to you (the pipeline uploads nothing); remove it": "push_to_hub push_to_hub_model_id "
        "push_to_hub_organization hub_model_id hub_strategy hub_private_repo hub_always_push hub_revision",
        "has no place in a file (tokens come from the environment only); remove it": "hub_token push_to_hub_token",
        "is set by the pipeline (the stage says what runs); remove it": "do_train do_eval do_predict",
        "is set by the launcher; remove it": "local_rank",
        "is set by the pipeline (from `launch: {processes: N, strategy: zero2}`, or `zero3`); remove it": "deepspeed",
        "is set by the pipeline (from `launch: {processes: N, strategy: fsdp2}`); remove it": "fsdp fsdp_config "
        "fsdp_min_num_params fsdp_transformer_layer_cls_to_wrap",
        "is not supported (a sequence is not divided between processes); remove it": "parallelism_config",
        "is set by the pipeline (it shows the progress itself); remove it": "disable_tqdm",
        "is set by the pipeline (each stage knows its columns); remove it": "remove_unused_columns",
        "is set by the pipeline (`sft` trains the answers, `pt` every token); remove it": "completion_only_loss "
        "assistant_only_loss",
        "is set by the pipeline (a checkpoint must be whole to go on from); remove it": "save_only_model "
        "ignore_data_skip",
        "is set by the pipeline (from `template`, at the top of the file); remove it": "chat_template_path "
        "eos_token pad_token",
    }
)
MANAGED = {
    "SFTConfig": _TRAINER_MANAGED,
    "DPOConfig": _TRAINER_MANAGED,
    "KTOConfig": _TRAINER_MANAGED,
    "RewardConfig": _TRAINER_MANAGED,
    "LoraConfig": _by_name(
        {
            "is set by the pipeline (from the stage's `model`); remove it": "base_model_name_or_path "
            "revision task_type auto_mapping",
            "is set by the pipeline (`lora:` trains LoRA, always); remove it": "peft_type inference_mode",
            "is written by peft itself; remove it": "peft_version",
        }
    ),
    "GPTQConfig": _by_name(
        {
            _FOLDER: "offload_to_disk_path",
            "is set by the pipeline (it takes the accelerator there is); remove it": "device",
            "is set by the pipeline (adapters are merged before); remove it": "adapter",
            "is written by gptqmodel itself; remove it": "meta",
        }
    ),
}
"""Settings that the pipeline sets itself, and why, by class."""

_TRAINER_MOVED = _by_name(
    {
        "`max_length`": "max_seq_length cutoff_len",
        "`learning_rate`": "lr",
        "`eval_strategy`": "evaluation_strategy",
        "`train_sampling_strategy: group_by_length`": "group_by_length",
        "`include_for_metrics`": "include_inputs_for_metrics",
        "`use_cpu`": "no_cuda",
        "`num_train_epochs`": "num_epochs",
        "`per_device_train_batch_size`": "per_gpu_train_batch_size micro_batch_size",
        "`per_device_eval_batch_size`": "per_gpu_eval_batch_size",
        "`warmup_steps` (a value below 1 is a share of all steps)": "warmup_ratio",
        "`dataset_num_proc`": "preprocessing_num_workers",
        "`report_to: tensorboard`": "plot_loss",
        "`model_init_kwargs: {use_kernels: true}`": "enable_liger_kernel",
        "`model_init_kwargs: {attn_implementation: …}`": "flash_attn",
        "`lora: {r: …}`": "lora_r lora_rank",
        "`lora: {lora_alpha: …}`": "lora_alpha",
        "`lora: {lora_dropout: …}`": "lora_dropout",
        "`lora: {target_modules: …}`": "lora_target",
        "`lora: {modules_to_save: …}`": "additional_target",
        "the stage's `lora:` (without it, every weight is trained)": "finetuning_type",
        "the stage's `model`": "model_name_or_path",
        "the stage's `data`": "dataset",
        "the stage's `eval_size`": "val_size",
        "the stage's `early_stopping`": "early_stopping_steps early_stopping_patience",
        "the one beside the stage's `model`": "tokenizer",
        "`template`, at the top of the file": "template",
        "always on": "save_safetensors",
    }
)
MOVED = {
    "SFTConfig": _TRAINER_MOVED
    | _by_name({"`packing`": "neat_packing", "the stage `pt`, which trains every token": "train_on_prompt"}),
    "DPOConfig": _TRAINER_MOVED
    | _by_name(
        {
            "`max_length` (prompt and answer together)": "max_prompt_length max_completion_length",
            "`beta`": "pref_beta",
            "`loss_type`": "pref_loss",
            "`loss_type: [sigmoid, sft]` with `loss_weights`": "rpo_alpha",
        }
    ),
    "KTOConfig": _TRAINER_MOVED
    | _by_name(
        {
            "`max_length` (prompt and answer together)": "max_prompt_length max_completion_length",
            "`beta`": "pref_beta",
            "`loss_type`": "pref_loss",
            "`desirable_weight`": "kto_chosen_weight",
            "`undesirable_weight`": "kto_rejected_weight",
        }
    ),
    "RewardConfig": _TRAINER_MOVED | _by_name({"`max_length` (prompt and answer together)": "max_prompt_length"}),
    "LoraConfig": _by_name(
        {
            "`r`": "rank lora_r lora_rank",
            "`lora_alpha`": "alpha",
            "`lora_dropout`": "dropout",
            "`target_modules`": "target lora_target",
            "`modules_to_save`": "additional_target",
        }
    ),
    "GPTQConfig": _by_name(
        {
            "`bits`": "wbits",
            "`group_size`": "groupsize",
            "`desc_act`": "act_order",
            "`damp_percent`": "damp",
            "`method`": "quant_method",
            "`format`": "checkpoint_format",
            "the stage's `data`": "dataset",
        }
    ),
}
"""Names of earlier versions and of other tools, and what to write instead, by class."""

HIDDEN = {
    "DPOConfig.loss_type": ("trl.trainer.dpo_trainer", r'\b(?:el)?if loss_type == "(\w+)"', ()),
    "DPOConfig.f_divergence_type": ("trl.trainer.dpo_trainer", r'f_divergence_type == "(\w+)"', ()),
    "log_level": ("transformers.utils.logging", r'^    "(\w+)": logging\.[A-Z]+,', ("passive",)),
    "log_level_replica": ("transformers.utils.logging", r'^    "(\w+)": logging\.[A-Z]+,', ("passive",)),
    "report_to": (
        "transformers.integrations.integration_utils",
        r'^    "(\w+)": \w+Callback,',
        ("all", "none"),
    ),
}
"""Choices that only the code of a library states: its module, a pattern for its text, and further choices."""

_LABELLED = "the stage `kto` does that, with rows of `format: labelled`"
_NO_STAGE = "which no stage runs"
ELSEWHERE = {
    "DPOConfig.loss_type": {
        "simpo": f"SimPO has no reference model: TRL's CPOTrainer, {_NO_STAGE}; `sigmoid_norm` also goes by the mean "
        "of an answer's tokens",
        "cpo": f"CPO has no reference model: TRL's CPOTrainer, {_NO_STAGE}; `[sigmoid, sft]` with `loss_weights` also "
        "trains on the chosen answer",
        "orpo": f"ORPO has no reference model: TRL's ORPOTrainer, {_NO_STAGE}; `[sigmoid, sft]` with `loss_weights` "
        "also trains on the chosen answer",
        **dict.fromkeys(("kto", "kto_pair", "bco"), _LABELLED),
        "rpo": "it is `[sigmoid, sft]` with `loss_weights`",
        "dpo": "it is `sigmoid`",
    },
}
"""Values that people know from other trainers, and where these are found, by class and setting."""
