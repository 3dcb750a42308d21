"""Why keys of other tools have no counterpart: each reason with the names it is about, `*` for any ending."""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import MappingProxyType

# The first reason with a name that fits is given.
_NAMES: Mapping[str, str] = MappingProxyType(
    {
        "a run records itself in metrics.jsonl, run.json and report.html; no tracking service is called": """
            wandb* use_wandb mlflow* use_mlflow* comet* use_comet* swanlab* use_swanlab trackio* use_trackio
            use_tensorboard report_to run_name logging_dir logging_first_step plot_loss experiment_name
            include_tokens_per_second include_num_input_tokens_seen include_effective_tokens_per_second""",
        "it changes speed or memory, not what is learned; the engine decides": """
            flash_att* flash_optimum sdp_attention xformers_attention s2_attention flex_attention attn_impl*
            eager_attention shift_attn torch_compile* tf32 *liger* unsloth_* use_unsloth* use_kernels use_cut_ce
            cut_cross_entropy* lora_mlp_kernel lora_qkv_kernel lora_o_kernel lora_embedding_kernel lora_on_cpu
            low_cpu_mem_usage gc_steps use_kv_cache upcast_* dataloader_* pad_to_* sample_packing_* multipack*
            eval_sample_packing packing_cross* batch_flattening neat_packing group_by_length torchdistx_path
            use_reentrant_gc gradient_checkpointing_kwargs* bnb_* double_quantization quantization_type
            quantization_device_map qlora_sharded* kernel_auto* activation_off* use_ring_attention use_flash_attn
            use_fsdp2* auto_batch_size_* auto_find_batch_size grad_accum_* auto_mixed_precision warmup_auto""",
        "several processes start with torchrun, and the file says nothing of them": """
            deepspeed* fsdp* ddp* device device_map max_memory* gpu_memory_limit world_size local_rank
            accelerator_config* tensor_parallel* context_parallel* sequence_parallel* dp_* ray_* heads_k_stride
            placement_strategy parallelism pipeline_stages""",
        "the files of a stream come in an order of the seed, and rows are shuffled once they are taken": """
            buffer_size streaming_* shuffle_buffer_size pretrain_multipack_buffer_size""",
        "rows are tokenized once and kept in the user cache; nothing of that is to be set": """
            dataset_prepared_path dataset_processes dataset_num_proc dataset_keep_in_memory dataset_shard*
            skip_prepare_dataset overwrite_cache preprocessing_* cache_dir tokenized_path
            shuffle_merged_datasets remove_unused_columns dataset_exact_deduplication disable_shuffling shards
            mix_strategy interleave*""",
        "nothing is uploaded; `hf auth login` holds the access token": "hub hub_* push_* hf_* ms_hub* om_hub*",
        "code from a model folder is never run": "trust_remote_code datasets*trust_remote_code",
        "it is read from the base's own files": """
            model_type tokenizer_* base_model_* processor_* is_*_derived_model cls_model_config use_fast_tokenizer
            rope_scaling* revision_of_model model_revision overrides_of_model* tie_word_embeddings yarn_*""",
        "no tokens are added: an adapter could not carry them": """
            special_tokens* tokens added_tokens* add_tokens add_special_tokens add_new_tokens new_special_tokens*
            init_special_tokens resize_* mean_resizing* fix_untrained_tokens split_special_tokens""",
        "an evaluation is the loss on the held-out rows, in the training's batch size": """
            eval_table_size eval_max_new_tokens eval_batch_size per_device_eval_batch_size compute_accuracy do_eval
            do_bench_eval bench_* do_causal_lm_eval eval_causal* eval_num_beams eval_on_each* eval_accumulation*""",
        "write the cadence in steps: `training.eval_steps` and `training.save_steps`": """
            evals_per_epoch saves_per_epoch eval_strategy evaluation_strategy save_strategy logging_strategy""",
        "it is asked for on the command line: `soupx train --resume` or `--overwrite`": """
            resume_from_checkpoint auto_resume_from_checkpoints overwrite_output_dir""",
        "a run ends where its steps end, and its last state is what counts": """
            early_stop* load_best_model* metric_for_best* greater_is_better loss_watchdog* loss_spike* save_only*
            forgetting* checkpoint_* convergence* eval_gate* echo_trap*""",
        "`soupx generate` and `soupx eval` do that after training": """
            do_predict predict_with_generate max_new_tokens temperature top_p top_k num_beams generate_samples*
            infer_* export_* default_system* eval eval.* advise advise.* merge_lora inference""",
        "one learning rate is used for the whole adapter": "loraplus_* lr_groups* embedding_lr*",
        "a preference loss has no second term for the chosen answer's tokens here; orpo's has one of its own": """
            pref_ftx rpo_alpha cpo_alpha dpo_ftx""",
        "the reference is the base itself, without the adapter": """
            ref_model* create_ref_model precompute_ref_log_probs""",
        "nothing here reads such a setting of a preference loss": """
            dpo_* orpo_* kto_* simpo_* rl_* pref_* ipo_* bco_* preference_*""",
        "set `training.rewards`, `group_size`, `max_new_tokens` and `temperature` by hand": """
            trl trl.* vllm vllm.* vllm_* ppo_* grpo_* reward_* num_generations num_labels teacher_* distill_*""",
        "the base stays frozen; the adapter alone is trained": """
            unfrozen_parameters freeze_* lora_modules_to_save additional_target use_llama_pro *galore* *apollo*
            *badam* lisa_* expand_layers""",
        "rows are text": "image_* video_* audio_* media_dir crop_to_patches",
        "the router is left as it is; `target_modules: auto+experts` reaches the experts": """
            train_router_only moe_* expert_*""",
        "no noise is added to embeddings": "neftune* noisy_embedding_alpha",
        "the schedules here fall to zero, or stay": """
            lr_scheduler_kwargs* cosine_min_lr* cosine_constant* lr_quadratic* lr_div*""",
        "the optimizer's settings here are `adam_beta1`, `adam_beta2` and `adam_epsilon`": "optim_*",
        "all rows are used; a shorter file is a smaller sample": "max_samples",
        "name the layers in `training.lora.target_modules` by a pattern": "peft_layer* layers_to_transform",
        "the starts here are random, pissa and olora": "peft peft.* loftq*",
        "every row is used in an order that the seed decides, and cut at `data.max_length`": """
            curriculum* min_sample_len max_prompt_len excess_length_strategy""",
        "everything is saved as safetensors": "save_safetensors",
        "nothing here reads such a setting": "lora_out_dir lora_fan_in_fan_out strict plugins debug ddp_timeout",
    }
)


def _pattern(names: str) -> str:
    return "|".join(re.escape(name).replace(r"\*", ".*") for name in names.split())


REASONS: tuple[tuple[str, str], ...] = tuple((_pattern(names), reason) for reason, names in _NAMES.items())
