"""Every argument of LLaMA-Factory 0.9.5: the setting that it becomes, or why it has none.

The arguments are those of its `hparams/*.py`; those of transformers' TrainingArguments that TRL has too pass through
under their own names, and are not listed. `docs/coming_from.md` shows these tables.
"""

from collections.abc import Mapping

from pipeline.tools.convert_launch import DEEPSPEED, FSDP, FSDP_DETAIL
from pipeline.tools.convert_parts import Known, by_name

SAME: Mapping[str, str] = {
    "cutoff_len": "trainer.max_length",
    "neftune_noise_alpha": "trainer.neftune_noise_alpha",
    "preprocessing_num_workers": "trainer.dataset_num_proc",
    "evaluation_strategy": "trainer.eval_strategy",
    "per_gpu_train_batch_size": "trainer.per_device_train_batch_size",
    "per_gpu_eval_batch_size": "trainer.per_device_eval_batch_size",
    "pref_beta": "trainer.beta",
    "ld_alpha": "trainer.ld_alpha",
    "kto_chosen_weight": "trainer.desirable_weight",
    "kto_rejected_weight": "trainer.undesirable_weight",
    "moe_aux_loss_coef": "trainer.router_aux_loss_coef",
    "lora_dropout": "lora.lora_dropout",
    "use_rslora": "lora.use_rslora",
    "use_dora": "lora.use_dora",
    "early_stopping_steps": "early_stopping",
    "streaming": "streaming",
    "seed": "seed",
}
"""Arguments whose value is taken as it is: the path of the setting in the stage."""

MADE: Mapping[str, str] = {
    "deepspeed": DEEPSPEED,
    "fsdp": FSDP,
    "fsdp_config": FSDP_DETAIL,
    "stage": "the kind of the stage: `pt`, `sft`, `dpo`, `kto`, `reward` (`rm`)",
    "finetuning_type": "`lora:` of the stage, or nothing for `full`",
    "model_name_or_path": "`model` of the config, or of the stage",
    "model_revision": "the commit in `model: org/name@commit`",
    "adapter_name_or_path": "`model: $stage` of the stage that wrote the adapter",
    "create_new_adapter": "always: each stage trains a new adapter, on the model of the stage above",
    "quantization_bit": "`quantized_base: nf4` or `int8`",
    "quantization_type": "nothing; 4 bits are NF4",
    "quantization_method": "nothing; bitsandbytes quantizes the base",
    "double_quantization": "nothing; the scales of NF4 are quantized too",
    "lora_rank": "`lora: {r: …}`",
    "lora_alpha": "`lora: {lora_alpha: …}`; twice the rank where it is not given",
    "lora_target": "`lora: {target_modules: […]}`; nothing for `all`",
    "additional_target": "`lora: {modules_to_save: […]}`",
    "dataset": "names under `data:`, from dataset_info.json",
    "eval_dataset": "`eval_data` of a training stage, `data` of `evaluate`",
    "dataset_dir": "the folder in `path` of each data set",
    "max_samples": "`max_samples` of each data set",
    "val_size": "`eval_size`",
    "mix_strategy": "a list of names, or weights for the `interleave` strategies",
    "interleave_probs": "weights: `data: {a: 0.7, b: 0.3}`",
    "packing": "`trainer: {packing: …}`; on in `pt` unless it is switched off, with `packing_strategy: wrapped`",
    "neat_packing": "`trainer: {packing: true}`",
    "template": "`template`: a built-in name, or a .jinja file beside the config",
    "default_system": "the system prompt in that .jinja file",
    "enable_thinking": "the empty thought in that .jinja file",
    "add_tokens": "`add_tokens: {words: […]}` at the top",
    "add_special_tokens": "`add_tokens: […]` at the top",
    "new_special_tokens_config": "`add_tokens: […]` at the top, the keys of that file",
    "disable_shuffling": "`trainer: {train_sampling_strategy: sequential}`",
    "group_by_length": "`trainer: {train_sampling_strategy: group_by_length}`",
    "warmup_ratio": "`trainer: {warmup_steps: …}`, where a value below 1 is a share",
    "pref_loss": "`trainer: {loss_type: …}`",
    "pref_ftx": "`trainer: {loss_type: [sigmoid, sft], loss_weights: [1, …]}`",
    "pref_bco_weight": "`trainer: {loss_type: [sigmoid, bco_pair], loss_weights: […]}`, both divided by 1 + its value",
    "ref_model": "nothing where it is the model that the stage starts from, which always is the reference",
    "ref_model_adapters": "as `ref_model`",
    "flash_attn": "`trainer: {model_init_kwargs: {attn_implementation: …}}`",
    "enable_liger_kernel": "`trainer: {model_init_kwargs: {use_kernels: true}}`",
    "disable_gradient_checkpointing": "`trainer: {gradient_checkpointing: false}`",
    "bf16": "`trainer: {bf16: …}`; `false` is written where neither `bf16` nor `fp16` is given",
    "fp16": "`trainer: {fp16: true}`; with LoRA also `model_init_kwargs: {dtype: float16}`",
    "pure_bf16": "`trainer: {bf16: false, model_init_kwargs: {dtype: bfloat16}}`",
    "metric_for_best_model": "`trainer: {metric_for_best_model: …}`, under TRL's name of the figure",
    "report_to": "`trainer: {report_to: …}`",
    "use_swanlab": "`trainer: {report_to: swanlab}`",
    "do_train": "a training stage",
    "do_predict": "an `evaluate` stage with `prompts`",
    "predict_with_generate": "an `evaluate` stage with `prompts`",
    "export_dir": "a `merge` stage, or `quantize` with `export_quantization_bit`",
    "export_size": "`shard_size`; 5GB where it is not given",
    "export_quantization_bit": "`quantize: {bits: …, group_size: 128}`",
    "export_quantization_dataset": "`quantize: {calibration: {data: …}}`",
    "export_quantization_nsamples": "`quantize: {calibration: {samples: …}}`; 128 where it is not given",
    "export_quantization_maxlen": "`quantize: {calibration: {max_length: …}}`; 1024 where it is not given",
    "task": "`evaluate: {tasks: […]}` of lm-evaluation-harness",
    "n_shot": "`evaluate: {harness: {num_fewshot: …}}`; 5 where it is not given",
    "batch_size": "`evaluate: {harness: {batch_size: …}}`; 4 where it is not given",
    "do_sample": "`evaluate: {generation: {do_sample: …}}`; true where it is not given",
    "temperature": "`evaluate: {generation: {temperature: …}}`; 0.95 where it is not given",
    "top_p": "`evaluate: {generation: {top_p: …}}`; 0.7 where it is not given",
    "top_k": "`evaluate: {generation: {top_k: …}}`; 50 where it is not given",
    "max_new_tokens": "`evaluate: {generation: {max_new_tokens: …}}`; 1024 where it is not given",
    "repetition_penalty": "`evaluate: {generation: {repetition_penalty: …}}`",
    "output_dir": "which stage starts from which; every stage writes into a folder of its own",
}
"""Arguments that the converter reads, and what they become."""

NOT_NEEDED: Mapping[str, str] = by_name(
    {
        "every stage writes into a folder of its own, and a finished one is never overwritten": "overwrite_output_dir "
        "save_dir logging_dir overwrite_cache adapter_folder",
        "a stopped stage goes on by itself": "resume_from_checkpoint ignore_data_skip",
        "the pipeline draws the curves itself: `pipeline report --curves`": "plot_loss",
        "the pipeline measures it in every run": "compute_accuracy include_effective_tokens_per_second "
        "include_tokens_per_second include_num_input_tokens_seen print_param_status",
        "`eval_strategy` and held-out rows say when is measured": "do_eval eval_on_each_dataset",
        "rows are prepared once and kept under the hash of all that made them": "tokenized_path "
        "preprocessing_batch_size data_shared_file_system",
        "rows of a stream are drawn from a buffer of 10,000": "buffer_size",
        "padding is never in the loss": "ignore_pad_token_for_loss",
        "the library chooses it, and the result is the same": "use_reentrant_gc low_cpu_mem_usage use_kv_cache "
        "offload_folder use_fast_tokenizer save_safetensors ddp_find_unused_parameters local_rank use_mps_device "
        "no_cuda half_precision_backend past_index logging_nan_inf_filter label_names remove_unused_columns "
        "generation_max_length generation_config sortish_sampler split_batches dispatch_batches jit_mode_eval use_ipex "
        "include_inputs_for_metrics tpu_num_cores tpu_metrics_debug torchdynamo ray_scope ddp_timeout "
        "overwrite_hub_dir mp_parameters fp16_opt_level fp16_backend",
        "models are loaded with the code of transformers alone, never with code of their own": "trust_remote_code",
        "`HF_HOME` says where the Hub's files are": "cache_dir",
        "tokens come from the environment only": "hf_hub_token ms_hub_token om_hub_token hub_token "
        "push_to_hub_token swanlab_api_key",
        "the tracker's own variables say it, such as `SWANLAB_MODE`": "swanlab_project swanlab_workspace "
        "swanlab_run_name swanlab_mode swanlab_logdir trackio_space_id",
        "weights are safetensors only": "export_legacy_format",
        "the shards are written one after the other, on the CPU": "export_device",
        "serving is no stage; serve the folder that the last stage leaves": "infer_backend infer_dtype vllm_maxlen "
        "vllm_gpu_util vllm_enforce_eager vllm_max_lora_rank vllm_config sglang_maxlen sglang_mem_fraction "
        "sglang_tp_size sglang_config sglang_lora_backend skip_special_tokens",
        "`max_new_tokens` limits an answer": "max_length",
        "new tokens get rows, and each row is the mean of all rows": "resize_vocab init_special_tokens",
        "a harness task has its own language and data": "lang task_dir download_mode",
        "it goes with `freeze`, which is not supported": "freeze_trainable_layers freeze_trainable_modules "
        "freeze_extra_modules",
        "it goes with `oft`, which is not supported": "module_dropout oft_rank oft_block_size oft_target",
        "it goes with another argument, which is not supported": "loraplus_lr_embedding pissa_iter pissa_convert "
        "simpo_gamma ppo_buffer_size ppo_epochs ppo_score_norm ppo_target ppo_whiten_rewards reward_model_adapters "
        "reward_model_quantization_bit reward_model_type ref_model_quantization_bit galore_target galore_rank "
        "galore_update_interval galore_scale galore_proj_type galore_layerwise apollo_target apollo_rank "
        "apollo_update_interval apollo_scale apollo_proj apollo_proj_type apollo_scale_type apollo_layerwise "
        "apollo_scale_front badam_mode badam_start_block badam_switch_mode badam_switch_interval badam_update_ratio "
        "badam_mask_mode badam_verbose hyper_parallel_args asft_alpha eaft_alpha quantization_device_map fp8_backend "
        "fp8_enable_fsdp_float8_all_gather kt_weight_path kt_expert_checkpoint_path kt_use_lora_experts "
        "kt_lora_expert_num kt_lora_expert_intermediate_size kt_optimize_rule kt_maxlen kt_use_cuda_graph kt_mode "
        "kt_force_think cpu_infer chunk_size mode swanlab_lark_secret ray_init_kwargs "
        "ray_run_name ray_storage_path ray_storage_filesystem resources_per_worker placement_strategy master_addr "
        "master_port profiler_output_dir profiler_wait_steps profiler_warmup_steps profiler_active_steps "
        "profiler_repeat profiler_record_shapes profiler_profile_memory profiler_with_stack",
        "only text is trained": "media_dir freeze_vision_tower freeze_multi_modal_projector freeze_language_model "
        "image_max_pixels image_min_pixels image_do_pan_and_scan crop_to_patches video_max_pixels video_min_pixels "
        "video_fps video_maxlen use_audio_in_video audio_sampling_rate image_resolution video_resolution "
        "image_max_resolution use_image video_min_frames",
    }
)
"""Arguments without a setting, because none is needed."""

NOT_SUPPORTED: Mapping[str, str] = by_name(
    {
        "`fsdp2` divides each layer; accelerate's other settings are not read": "fsdp_min_num_params "
        "fsdp_transformer_layer_cls_to_wrap accelerator_config",
        "GaLore is not supported; AdamW is used here, whose state needs 8 bytes for each trained weight": "use_galore",
        "APOLLO is not supported; AdamW is used here, whose state needs 8 bytes for each trained weight": "use_apollo",
        "BAdam is not supported; AdamW trains all layers at once here, which needs more memory": "use_badam",
        "Adam-mini is not supported; AdamW is used here": "use_adam_mini",
        "Muon is not supported; AdamW is used here": "use_muon",
        "LoRA+ is not supported: A and B are trained with one learning rate": "loraplus_lr_ratio",
        "PiSSA also changes the base, so later stages could not fold the adapter; LoRA is used here": "pissa_init",
        "expanded blocks (LLaMA Pro) are not supported": "use_llama_pro",
        "LongLoRA's shifted attention is not supported": "shift_attn",
        "mixture of depths is not supported": "mixture_of_depths",
        "unsloth's kernels are not supported; the result is the same without": "use_unsloth use_unsloth_gc",
        "KTransformers is not supported": "use_kt",
        "kernels of LLaMA-Factory's own are not supported; the result is the same without": "use_v1_kernels",
        "Megatron is not supported": "use_mca tensor_model_parallel_size pipeline_model_parallel_size "
        "virtual_pipeline_model_parallel_size expert_model_parallel_size context_parallel_size sequence_parallel "
        "bias_activation_fusion apply_rope_fusion use_distributed_optimizer overlap_param_gather overlap_grad_reduce "
        "moe_grouped_gemm moe_token_dispatcher_type recompute_granularity",
        "Gaudi accelerators are not supported": "use_habana use_lazy_mode gaudi_config_name throughput_warmup_steps "
        "use_hpu_graphs_for_training use_hpu_graphs_for_inference",
        "HyperParallel is not supported": "use_hyper_parallel",
        "Ray is not supported; `launch: {processes: N}` starts processes on one machine": "use_ray ray_num_workers",
        "training in FP8 is not supported; `bf16` is used here": "fp8",
        "this loss is not supported; cross-entropy is used here": "use_dft_loss use_asft_loss use_eaft_loss",
        "positions are not scaled here; set `rope_scaling` in the model's config.json": "rope_scaling",
        "the dtype of single layers is not set here": "upcast_layernorm upcast_lmhead_output",
        "special tokens in a text are always read as such": "split_special_tokens",
        "training from random weights is not supported here; an `init` stage makes a small model": "train_from_scratch",
        "`sft` trains the answers alone, `pt` every token of a text": "train_on_prompt",
        "`sft` trains every answer of a conversation": "mask_history",
        "thoughts of earlier answers are kept as the rows have them": "preserve_thinking",
        "the template writes tools in its own form": "tool_format",
        "TRL's `sigmoid` has no label smoothing; `loss_type: robust` has another kind of it": "dpo_label_smoothing",
        "reinforcement learning (PPO) is not supported": "reward_model",
        "answers are generated without beams": "num_beams length_penalty eval_num_beams generation_num_beams",
        "a run uploads nothing; `pipeline push` uploads a finished stage": "push_to_hub hub_model_id "
        "export_hub_model_id hub_strategy hub_private_repo hub_always_push push_to_hub_model_id "
        "push_to_hub_organization",
        "the profiler is not supported": "enable_torch_profiler profile_modules",
        "messages to Lark are not supported": "swanlab_lark_webhook_url",
    }
)
"""Arguments without a setting, and why there is none."""

EARLIER: Mapping[str, str] = {
    "checkpoint_dir": "adapter_name_or_path",
    "dpo_beta": "pref_beta",
    "orpo_beta": "pref_beta",
    "dpo_loss": "pref_loss",
    "dpo_ftx": "pref_ftx",
    "sft_packing": "packing",
    "system_prompt": "default_system",
    "num_layer_trainable": "freeze_trainable_layers",
    "name_module_trainable": "freeze_trainable_modules",
    "visual_inputs": "use_image",
    "prompt_template": "template",
}
"""Names that arguments had in earlier versions → their names today."""

OFF = {"num_beams": 1, "length_penalty": 1.0, "generation_num_beams": 1, "ray_num_workers": 1, "eval_num_beams": 1}
KNOWN = Known(NOT_NEEDED, NOT_SUPPORTED, frozenset({*SAME, *MADE}), OFF)
READ = frozenset({*MADE, *NOT_NEEDED, *NOT_SUPPORTED})
"""Arguments that do not pass through, although TRL has settings of the same name."""
