"""A migration from beginning to end: whose file it is, each key taken, and what `soupx check` says of the result."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from textwrap import wrap
from types import MappingProxyType
from typing import Any

from attrs import frozen

from soup_xb.core.config.keys import safe_text
from soup_xb.core.config.load import parse_config
from soup_xb.core.config.schema import KEYS
from soup_xb.core.config.support import refusals
from soup_xb.core.config.support_rows import BACKENDS, ROWS, Row
from soup_xb.core.config.yaml import Node, write_yaml
from soup_xb.core.errors import ConfigError, Problem
from soup_xb.migrate import soup
from soup_xb.migrate.account import Account, Added, Carried, Left, entries, read_source
from soup_xb.migrate.axolotl import read_axolotl
from soup_xb.migrate.llama_factory import read_llama_factory

AXOLOTL, LLAMA_FACTORY, SOUP = "axolotl", "llama-factory", "soup"
_READERS: Mapping[str, Callable[[Account], None]] = MappingProxyType(
    {AXOLOTL: read_axolotl, LLAMA_FACTORY: read_llama_factory, SOUP: soup.read_soup}
)
TOOLS = tuple(_READERS)
# Without them it would be another run; the check says what is refused.
_KEPT = ("task", "data.format", "backend")


@frozen
class Migration:
    """One file of another tool as ours. Every key of it is in `carried` or in `left`.

    `problems` is what `soupx check` refuses in the result, empty where it passes.
    """

    tool: str
    source: str
    text: str
    carried: tuple[Carried, ...]
    added: tuple[Added, ...]
    left: tuple[Left, ...]
    problems: tuple[Problem, ...]


def migrate(text: str, source: str, tool: str = "auto") -> Migration:
    """The config that another tool's YAML text means here; `source` names it in errors.

    Raises ConfigError for a text that is no YAML mapping, that is no known tool's, and that asks for a task
    which is not among ours.
    """
    root = read_source(text, source)
    tool = detect(root, source) if tool == "auto" else tool
    account = Account(tool, source, entries(root, soup.WHOLE if tool == SOUP else ()))
    _READERS[tool](account)
    account.leave_rest(REASONS)
    _withdraw_unavailable(account)
    written = _text(account, source)
    return Migration(
        tool,
        source,
        written,
        tuple(sorted(account.carried, key=lambda carried: carried.line)),
        tuple(account.added),
        tuple(sorted(account.left, key=lambda left: left.line)),
        _problems(written),
    )


def _withdraw_unavailable(account: Account) -> None:
    """Take back what no backend offers, so that the rest runs; the account names it."""
    for row in ROWS:
        refused = [row.answer(backend) for backend in BACKENDS]
        if row.key in account.values and row.key not in _KEPT and all(refused) and _asked(row, account):
            why = next(no.because for no in refused if no is not None)
            account.withdraw(row.key, f"not available: {why}")


def _asked(row: Row, account: Account) -> bool:
    value = account.values[row.key]
    return bool(value == row.choice) if row.choice else bool(value != KEYS[row.key].default)


def _text(account: Account, source: str) -> str:
    """The config as YAML in the order of our keys, with a head that says where it comes from."""
    nested: dict[str, Any] = {}
    for key in KEYS:
        if key not in account.values:
            continue
        *sections, name = key.split(".")
        target = nested
        for section in sections:
            target = target.setdefault(section, {})
        value = account.values[key]
        target[name] = value[0] if key in ("data.train", "data.eval") and len(value) == 1 else value
    head = f"From the {account.tool} file {safe_text(source)}, by soupx migrate."
    names = ", ".join(safe_text(left.key) for left in account.left)
    told = [head, *wrap(f"Not carried over: {names}." if names else "", 108)]
    return "".join(f"# {line}\n" for line in told) + write_yaml(nested)


def _problems(text: str) -> tuple[Problem, ...]:
    """What a check of the result says: its own mistakes, else what no backend runs."""
    try:
        loaded = parse_config(text, "soup.yaml")
    except ConfigError as error:
        return error.problems
    if loaded.config.backend != "auto":
        return tuple(refusals(loaded, loaded.config.backend))
    found = [tuple(refusals(loaded, backend)) for backend in BACKENDS]
    return () if not all(found) else found[0]


# Keys that one of the tools has and the others do not.
_SIGNS = {
    AXOLOTL: {
        *("base_model", "datasets", "pretraining_dataset", "sequence_len", "micro_batch_size", "num_epochs"),
        *("val_set_size", "lora_target_linear", "lora_target_modules", "load_in_4bit", "load_in_8bit"),
        *("sample_packing", "adapter", "rl"),
    },
    LLAMA_FACTORY: {
        *("model_name_or_path", "stage", "finetuning_type", "template", "dataset", "dataset_dir"),
        *("cutoff_len", "lora_rank", "lora_target", "quantization_bit", "do_train", "val_size"),
        *("per_device_train_batch_size", "num_train_epochs"),
    },
    SOUP: {"base", "task", "data", "training", "output", "modality", "experiment_name"},
}


def detect(root: Node, source: str) -> str:
    """The tool whose keys the file has. Raises ConfigError where they are nobody's, or two tools' alike."""
    counts = {tool: len(signs & root.value.keys()) for tool, signs in _SIGNS.items()}
    best = max(counts.values())
    found = [tool for tool, count in counts.items() if count == best]
    if best == 0 or len(found) > 1:
        told = (
            "has the keys of no tool that is known here" if best == 0 else f"could be of {' or '.join(found)}"
        )
        raise ConfigError(
            "migrate-unknown",
            told,
            where=source,
            help=f"say whose it is: `--from {'`, `--from '.join(_SIGNS)}`.",
        )
    return found[0]


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
        "the task's loss has no second term for the chosen answer's tokens; those of orpo, simpo and cpo have one": """
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
