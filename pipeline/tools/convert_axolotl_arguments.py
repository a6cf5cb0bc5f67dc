"""Arguments of Axolotl's configs: the setting that each becomes, or why it has none."""

from collections.abc import Mapping

from pipeline.tools.convert_parts import Known, by_name

SAME: Mapping[str, str] = {
    "sequence_len": "trainer.max_length",
    "micro_batch_size": "trainer.per_device_train_batch_size",
    "eval_batch_size": "trainer.per_device_eval_batch_size",
    "num_epochs": "trainer.num_train_epochs",
    "lr_scheduler": "trainer.lr_scheduler_type",
    "optimizer": "trainer.optim",
    "dataset_processes": "trainer.dataset_num_proc",
    "kto_desirable_weight": "trainer.desirable_weight",
    "kto_undesirable_weight": "trainer.undesirable_weight",
    "dpo_use_weighting": "trainer.use_weighting",
    "wandb_name": "trainer.run_name",
    "adam_beta2": "trainer.adam_beta2",
    "early_stopping_patience": "early_stopping",
}
MADE: Mapping[str, str] = {
    "base_model": "`model`",
    "revision_of_model": "the commit in `model: org/name@commit`",
    "rl": "the kind of the stage: `dpo` (`dpo`, `ipo`), `kto`",
    "reward_model": "the stage `reward`",
    "datasets": "names under `data:`; `type` says which format",
    "pretraining_dataset": "a stage `pt`",
    "test_datasets": "`eval_data`",
    "val_set_size": "`eval_size`",
    "adapter": "`lora:` of the stage, or nothing",
    "lora_r": "`lora: {r: …}`",
    "lora_alpha": "`lora: {lora_alpha: …}`",
    "lora_dropout": "`lora: {lora_dropout: …}`",
    "lora_target_modules": "`lora: {target_modules: […]}`",
    "lora_target_linear": "nothing: every linear layer is the default",
    "lora_modules_to_save": "`lora: {modules_to_save: […]}`",
    "peft_use_dora": "`lora: {use_dora: true}`",
    "peft_use_rslora": "`lora: {use_rslora: true}`",
    "lora_model_dir": "`model: $stage` of the stage that wrote the adapter",
    "chat_template": "`template`: a built-in name, or a .jinja file beside the config",
    "chat_template_jinja": "`template`: a .jinja file beside the config",
    "default_system_message": "the system prompt in that .jinja file",
    "tokens": "`add_tokens: {words: […]}` at the top",
    "sample_packing": "`trainer: {packing: true}`",
    "bf16": "`trainer: {bf16: …}`; `auto` follows the machine, as without it",
    "fp16": "`trainer: {fp16: true}`",
    "bfloat16": "`trainer: {bf16: false, model_init_kwargs: {dtype: bfloat16}}`",
    "flash_attention": "`trainer: {model_init_kwargs: {attn_implementation: flash_attention_2}}`",
    "sdp_attention": "`trainer: {model_init_kwargs: {attn_implementation: sdpa}}`",
    "eager_attention": "`trainer: {model_init_kwargs: {attn_implementation: eager}}`",
    "attention": "`trainer: {model_init_kwargs: {attn_implementation: …}}`",
    "attn_implementation": "`trainer: {model_init_kwargs: {attn_implementation: …}}`",
    "warmup_ratio": "`trainer: {warmup_steps: …}`, where a value below 1 is a share",
    "evals_per_epoch": "`trainer: {eval_strategy: steps, eval_steps: …}` as a share of all steps",
    "saves_per_epoch": "`trainer: {save_steps: …}` as a share of all steps",
    "cosine_min_lr_ratio": "`trainer: {lr_scheduler_type: cosine_with_min_lr, lr_scheduler_kwargs: …}`",
    "rl_beta": "`trainer: {beta: …}`",
    "dpo_beta": "`trainer: {beta: …}`",
    "rpo_alpha": "`trainer: {loss_type: [sigmoid, sft], loss_weights: [1, …]}`",
    "group_by_length": "`trainer: {train_sampling_strategy: group_by_length}`",
    "gradient_checkpointing": "`trainer: {gradient_checkpointing: …}`; `false` is written where it is not given",
    "wandb_project": "`trainer: {report_to: wandb}`; the variable `WANDB_PROJECT` names the project",
    "mlflow_tracking_uri": "`trainer: {report_to: mlflow}`; the variable of the same name has the address",
    "use_tensorboard": "`trainer: {report_to: tensorboard}`",
    "seed": "`seed`",
    "output_dir": "which stage starts from which; every stage writes into a folder of its own",
}
NOT_NEEDED: Mapping[str, str] = by_name(
    {
        "the model's own config.json names its type and its tokenizer": "model_type tokenizer_type tokenizer_config "
        "base_model_config num_labels tokenizer_use_fast tokenizer_legacy is_llama_derived_model "
        "is_mistral_derived_model is_falcon_derived_model is_qwen_derived_model base_model_ignore_patterns "
        "trust_remote_code",
        "rows are prepared once and kept under the hash of all that made them": "dataset_prepared_path "
        "dataset_keep_in_memory shuffle_merged_datasets remove_unused_columns",
        "padding does not change the result": "pad_to_sequence_len eval_sample_packing sample_packing_eff_est "
        "total_num_tokens sample_packing_group_size sample_packing_bin_size batch_flattening eval_table_size",
        "a stopped stage goes on by itself": "resume_from_checkpoint auto_resume_from_checkpoints save_only_model",
        "the library chooses it, and the result is the same": "device_map max_memory gpu_memory_limit lora_on_cpu "
        "lora_fan_in_fan_out strict local_rank ddp_timeout save_safetensors include_tokens_per_second s2_attention "
        "save_first_step embeddings_skip_upcast lora_mlp_kernel lora_qkv_kernel lora_o_kernel xformers_attention "
        "gradient_checkpointing_kwargs debug flash_attn_cross_entropy flash_attn_rms_norm "
        "flash_attn_fuse_qkv flash_attn_fuse_mlp",
        "the tracker's own variables say it": "wandb_entity wandb_watch wandb_run_id wandb_log_model wandb_mode "
        "mlflow_experiment_name mlflow_run_name hf_mlflow_log_artifacts use_wandb",
        "tokens come from the environment only": "hf_use_auth_token",
        "the tokenizer has them, and the template ends the answers": "special_tokens eot_tokens",
        "the loss of every stage is checked at every step": "loss_watchdog_threshold loss_watchdog_patience",
        "it goes with `load_in_4bit`, which is not supported": "bnb_config_kwargs gptq gptq_disable_exllama",
    }
)
NOT_SUPPORTED: Mapping[str, str] = by_name(
    {
        "a base in 4 or 8 bits (QLoRA) is not supported yet; the base is loaded in 16 bits here, which needs up to "
        "four times the memory for weights": "load_in_4bit load_in_8bit",
        "DeepSpeed is not supported yet; `launch: {processes: N}` runs data-parallel": "deepspeed",
        "FSDP is not supported yet; `launch: {processes: N}` runs data-parallel": "fsdp fsdp_config fsdp_version",
        "parts of one sequence on several devices are not supported": "sequence_parallel_degree context_parallel_size "
        "tensor_parallel_size",
        "plugins are not supported; the result is the same without Liger's and CCE's kernels": "plugins "
        "liger_rope liger_rms_norm liger_glu_activation liger_fused_linear_cross_entropy liger_layer_norm "
        "cut_cross_entropy unsloth_lora_mlp unsloth_lora_qkv unsloth_lora_o unsloth_cross_entropy_loss",
        "TRL's `sigmoid` has no label smoothing; `loss_type: robust` has another kind of it": "dpo_label_smoothing",
        "ids of a tokenizer are not given to other tokens here": "added_tokens_overrides "
        "resize_token_embeddings_to_32x shrink_embeddings",
        "LoRA+ is not supported: A and B are trained with one learning rate": "loraplus_lr_ratio loraplus_lr_embedding",
        "this variant of LoRA is not supported": "relora_steps relora_warmup_steps relora_anneal_steps "
        "relora_prune_ratio relora_cpu_offload peft_layer_replication peft peft_init_lora_weights lisa_n_layers",
        "only some layers of a model are not trained here": "unfrozen_parameters peft_layers_to_transform "
        "lora_target_parameters",
        "the model's configuration is not changed here": "overrides_of_model_config overrides_of_model_kwargs",
        "training of quantized weights is not supported": "qat quantization",
        "`sft` trains the answers alone, `pt` every token of a text": "train_on_inputs",
        "this loss is not supported": "orpo_alpha simpo_gamma cpo_alpha trl",
        "training from random weights is not supported here; an `init` stage makes a model": "random_init_weights",
        "nothing is uploaded; push the finished folder yourself": "hub_model_id hub_strategy push_dataset_to_hub",
        "the order of rows depends on the seed alone": "curriculum_sampling sample_pack_sequentially",
        "the profiler is not supported": "profiler_steps",
        "duplicates are removed by `clean: [exact_duplicates]` of a data set": "dataset_exact_deduplication",
        "this schedule is not supported": "lr_quadratic_warmup cosine_constant_lr_ratio lr_div_factor",
        "answers are measured by an `evaluate` stage": "do_bench_eval do_causal_lm_eval eval_causal_lm_metrics "
        "eval_max_new_tokens",
        "Comet is not set up from a config; its own variables say it": "use_comet comet_project_name comet_workspace",
    }
)
KNOWN = Known(NOT_NEEDED, NOT_SUPPORTED, frozenset({*SAME, *MADE}))
READ = frozenset({*MADE, *NOT_NEEDED, *NOT_SUPPORTED})
