"""Arguments of Axolotl's configs: the setting that each becomes, or why it has none."""

from collections.abc import Mapping

from pipeline.tools.convert_launch import DEEPSPEED, FSDP, FSDP_DETAIL
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
    "dpo_loss_type": "trainer.loss_type",
    "dpo_loss_weights": "trainer.loss_weights",
    "evaluation_strategy": "trainer.eval_strategy",
    "noisy_embedding_alpha": "trainer.neftune_noise_alpha",
    "streaming": "streaming",
    "wandb_name": "trainer.run_name",
    "adam_beta2": "trainer.adam_beta2",
    "early_stopping_patience": "early_stopping",
}
MADE: Mapping[str, str] = {
    "deepspeed": DEEPSPEED,
    "fsdp": FSDP,
    "fsdp_config": FSDP_DETAIL,
    "fsdp_version": "nothing; `fsdp2` is version 2",
    "base_model": "`model`",
    "revision_of_model": "the commit in `model: org/name@commit`",
    "rl": "the kind of the stage: `dpo` (`dpo`, `ipo`), `kto`",
    "reward_model": "the stage `reward`",
    "datasets": "names under `data:`; `type` says which format",
    "pretraining_dataset": "a stage `pt`",
    "test_datasets": "`eval_data`",
    "val_set_size": "`eval_size`",
    "adapter": "`lora:` of the stage, or nothing",
    "load_in_4bit": "`quantized_base: nf4`",
    "load_in_8bit": "`quantized_base: int8`",
    "bnb_config_kwargs": "nothing; 4 bits are NF4, and the scales are quantized too",
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
    "float16": "`trainer: {model_init_kwargs: {dtype: float16}}`",
    "float32": "`trainer: {model_init_kwargs: {dtype: float32}}`",
    "use_kernels": "`trainer: {model_init_kwargs: {use_kernels: true}}`",
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
    "use_mlflow": "`trainer: {report_to: mlflow}`",
    "use_trackio": "`trainer: {report_to: trackio}`",
    "use_swanlab": "`trainer: {report_to: swanlab}`",
    "seed": "`seed`",
    "output_dir": "which stage starts from which; every stage writes into a folder of its own",
}
NOT_NEEDED: Mapping[str, str] = by_name(
    {
        "the model's own config.json names its type and its tokenizer": "model_type tokenizer_type tokenizer_config "
        "base_model_config num_labels tokenizer_use_fast tokenizer_legacy is_llama_derived_model "
        "is_mistral_derived_model is_falcon_derived_model is_qwen_derived_model base_model_ignore_patterns "
        "trust_remote_code cls_model_config type_of_model tokenizer_use_mistral_common tokenizer_save_jinja_files",
        "rows are prepared once and kept under the hash of all that made them": "dataset_prepared_path "
        "dataset_keep_in_memory shuffle_merged_datasets remove_unused_columns skip_prepare_dataset is_preprocess "
        "preprocess_iterable num_dataset_shards_to_save shuffle_before_merging_datasets total_supervised_tokens",
        "padding does not change the result": "pad_to_sequence_len eval_sample_packing sample_packing_eff_est "
        "total_num_tokens sample_packing_group_size sample_packing_bin_size batch_flattening eval_table_size "
        "max_packed_sequence_len sample_packing_mp_start_method multipack_real_batches pretrain_multipack_buffer_size "
        "streaming_multipack_buffer_size pretrain_multipack_attn dpo_padding_free eval_sequence_len",
        "a stopped stage goes on by itself": "resume_from_checkpoint auto_resume_from_checkpoints save_only_model",
        "the library chooses it, and the result is the same": "device_map max_memory gpu_memory_limit lora_on_cpu "
        "lora_fan_in_fan_out strict local_rank ddp_timeout save_safetensors include_tokens_per_second s2_attention "
        "save_first_step embeddings_skip_upcast lora_mlp_kernel lora_qkv_kernel lora_o_kernel xformers_attention "
        "gradient_checkpointing_kwargs debug flash_attn_cross_entropy flash_attn_rms_norm "
        "flash_attn_fuse_qkv flash_attn_fuse_mlp flash_optimum sage_attention flex_attention flex_attn_compile_kwargs "
        "gemma4_hybrid_attn_impl large_head_attention flash_attn_d512 sdpa_varlen fused_attn_kernel "
        "lora_embedding_kernel experts_implementation ple_cpu_offload chunked_cross_entropy device world_size ddp "
        "chunked_cross_entropy_num_chunks tiled_mlp tiled_mlp_num_shards tiled_mlp_use_original_mlp deepcompile "
        "torch_compile_options gc_steps gc_collect_steps selective_checkpointing layer_offloading low_cpu_mem_usage "
        "llama4_linearized_experts torchdistx_path include_tkps experimental_skip_move_to_device batch_size "
        "dpo_use_liger_kernel dpo_use_logits_to_keep trainer_cls heads_k_stride ring_attn_func fix_untrained_tokens "
        "fp32_norms fp32_norm_classes peft_autocast_adapter_dtype peft_ensure_weight_tying qlora_sharded_model_loading "
        "merge_lora merge_method axolotl_config_path",
        "only text is trained": "processor_type processor_kwargs freeze_mm_modules image_size image_resize_algorithm "
        "role_boundaries",
        "a finished stage is used with `pipeline chat` and `pipeline serve`": "gradio_title gradio_share "
        "gradio_server_name gradio_server_port gradio_max_new_tokens gradio_temperature generation_max_new_tokens "
        "generation_top_p generation_top_k generation_prompt_ratio generation_do_sample dpo_generate_during_eval vllm",
        "the tracker's own variables say it": "wandb_entity wandb_watch wandb_run_id wandb_log_model wandb_mode "
        "mlflow_experiment_name mlflow_run_name hf_mlflow_log_artifacts use_wandb trackio_project_name "
        "trackio_run_name swanlab_project swanlab_experiment_name swanlab_description swanlab_mode swanlab_workspace "
        "swanlab_api_key swanlab_log_model swanlab_web_host swanlab_api_host swanlab_lark_webhook_url "
        "swanlab_lark_secret swanlab_log_completions swanlab_completion_log_interval swanlab_completion_max_buffer "
        "use_otel_metrics otel_metrics_host otel_metrics_port",
        "tokens come from the environment only": "hf_use_auth_token",
        "the tokenizer has them, and the template ends the answers": "special_tokens eot_tokens",
        "the loss of every stage is checked at every step": "loss_watchdog_threshold loss_watchdog_patience",
        "it goes with `gptq`, which is not supported": "gptq_disable_exllama gptq_groupsize gptq_model_v1",
    }
)
NOT_SUPPORTED: Mapping[str, str] = by_name(
    {
        "an adapter is not trained on a base in GPTQ; name the base as it was before": "gptq",
        "parts of one sequence on several devices are not supported": "sequence_parallel_degree context_parallel_size "
        "tensor_parallel_size dp_shard_size dp_replicate_size expert_parallel_size expert_parallel_backend "
        "expert_parallel_num_nvl_bytes expert_parallel_num_rdma_bytes expert_parallel_token_capacity "
        "expert_parallel_fallback_on_unsupported",
        "Ray is not supported; `launch: {processes: N}` starts processes on one machine": "use_ray ray_run_name "
        "ray_num_workers resources_per_worker",
        "training in FP8 is not supported; `bf16` is used here": "fp8 fp8_config fp8_enable_fsdp_float8_all_gather",
        "Axolotl's kernels for experts are not supported; the result is the same without": "use_scattermoe "
        "use_sonicmoe use_dsv4_kernels use_glm_dsa_kernels expert_backend moe_grouped_backend "
        "moe_dequant_chunk_size moe_bnb_fast",
        "weights that are quantized for training are not supported here": "nonexpert_quantization quantize_moe_experts "
        "dsv4_fp8_nonexpert_mode dsv4_fp8_lora_kernel dsv4_shared_mlp_lora_kernel dsv4_bf16_all dsv4_fp4_grouped_mode "
        "gemma4_fp8_nonexpert gemma4_nf4_nonexpert nvfp4_merge_aware nvfp4_merge_aware_start_step "
        "model_quantization_config model_quantization_config_kwargs use_onebitllms",
        "plugins are not supported; the result is the same without Liger's and CCE's kernels": "plugins "
        "liger_rope liger_rms_norm liger_glu_activation liger_fused_linear_cross_entropy liger_layer_norm "
        "liger_rms_norm_gated liger_swiglu liger_cross_entropy liger_use_token_scaling liger_kernel_impl "
        "cut_cross_entropy unsloth_lora_mlp unsloth_lora_qkv unsloth_lora_o unsloth_cross_entropy_loss",
        "TRL's `sigmoid` has no label smoothing; `loss_type: robust` has another kind of it": "dpo_label_smoothing",
        "ids of a tokenizer are not given to other tokens here": "added_tokens_overrides "
        "resize_token_embeddings_to_32x shrink_embeddings",
        "LoRA+ is not supported: A and B are trained with one learning rate": "loraplus_lr_ratio loraplus_lr_embedding",
        "this variant of LoRA is not supported": "relora_steps relora_warmup_steps relora_anneal_steps "
        "relora relora_prune_method jagged_restart_steps jagged_restart_warmup_steps jagged_restart_anneal_steps "
        "lisa_step_interval lisa_layers_attribute lora_rank_pattern lora_alpha_pattern peft_layers_pattern "
        "peft_trainable_token_indices use_mora mora mora_type "
        "relora_prune_ratio relora_cpu_offload peft_layer_replication peft peft_init_lora_weights lisa_n_layers",
        "only some layers of a model are not trained here": "unfrozen_parameters peft_layers_to_transform "
        "lora_target_parameters spectrum_top_fraction spectrum_model_name",
        "the model's configuration is not changed here": "overrides_of_model_config overrides_of_model_kwargs "
        "rope_scaling use_pose pose_split_on_token_ids pose_max_context_len pose_num_chunks scaling_softmax "
        "scaling_softmax_factor scaling_softmax_bias dense_mixer",
        "training of quantized weights is not supported": "qat quantization",
        "`sft` trains the answers alone, `pt` every token of a text": "train_on_inputs",
        "this loss is not supported": "orpo_alpha simpo_gamma cpo_alpha trl ebft diffusion use_eaft eaft_alpha "
        "eaft_k dpo_norm_loss process_reward_model kd_trainer kd_ce_alpha kd_alpha kd_temperature kd_beta "
        "kd_normalize_topk kd_online_server_base_url kd_online_topk kd_online_server kd_online_timeout "
        "kd_temperature_min",
        "AdamW trains every weight with one learning rate here": "embedding_lr embedding_lr_scale lr_groups adam_beta3 "
        "adam_epsilon2 dion_lr dion_momentum dion_rank_fraction dion_rank_multiple_of qgalore_rank "
        "qgalore_update_proj_gap qgalore_scale qgalore_proj_type qgalore_proj_quant qgalore_proj_bits "
        "qgalore_proj_group_size qgalore_cos_threshold qgalore_gamma_proj qgalore_queue_size grokfast_alpha "
        "grokfast_lamb",
        "sparse training is not supported": "llmcompressor recipe save_compressed",
        "settings of one template are written into a .jinja file, which `template` names": "chat_template_kwargs",
        "short and long rows are left out by `clean:` of a data set": "min_sample_len excess_length_strategy "
        "max_prompt_len",
        "every process reads every row; a part of a data set is written as `max_samples`": "dataset_shard_num "
        "dataset_shard_idx",
        "training from random weights is not supported here; an `init` stage makes a model": "random_init_weights "
        "reinit_weights",
        "a run uploads nothing; `pipeline push` uploads a finished stage": "hub_model_id hub_strategy "
        "push_dataset_to_hub",
        "the order of rows depends on the seed alone": "curriculum_sampling sample_pack_sequentially "
        "sample_packing_sequentially pretraining_sample_concatenation",
        "the profiler is not supported": "profiler_steps profiler_steps_start",
        "duplicates are removed by `clean: [exact_duplicates]` of a data set": "dataset_exact_deduplication",
        "this schedule is not supported": "lr_quadratic_warmup cosine_constant_lr_ratio lr_div_factor",
        "answers are measured by an `evaluate` stage": "do_bench_eval do_causal_lm_eval eval_causal_lm_metrics "
        "eval_max_new_tokens bench_dataset bench_split lm_eval_tasks lm_eval_batch_size lm_eval_post_train "
        "lm_eval_model",
        "Comet is not set up from a config; its own variables say it": "use_comet comet_project_name comet_workspace "
        "comet_api_key comet_experiment_key comet_mode comet_online comet_experiment_config",
    }
)
KNOWN = Known(NOT_NEEDED, NOT_SUPPORTED, frozenset({*SAME, *MADE}))
READ = frozenset({*MADE, *NOT_NEEDED, *NOT_SUPPORTED})
