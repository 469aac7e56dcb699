"""Settings of other tools that people try, and what they are called here (docs/guides/coming-from.md)."""

from __future__ import annotations

_SETTINGS = {
    "optimizer.lr": "learning_rate",
    "optimizer.lr_warmup_steps": "warmup_steps warmup_ratio lr_warmup_iters num_warmup_steps",
    "optimizer.lr_schedule": "lr_scheduler_type lr_scheduler lr_decay_style",
    "run.dir": "output_dir run_dir save_path default_local_dir",
    "model.path": "model_name_or_path model_name pretrained_model_name_or_path base_model hf_checkpoint",
    "model.dtype": "bf16 fp16 torch_dtype precision",
    "training.num_steps": "max_steps total_steps total_training_steps num_iterations",
    "training.num_epochs": "num_train_epochs epochs total_epochs",
    "training.batch_size": "per_device_train_batch_size train_batch_size global_batch_size",
    "rollout.num_prompts_per_step": "per_device_train_batch_size train_batch_size rollout_batch_size",
    "packing.max_tokens_per_microbatch": "gradient_accumulation_steps micro_batch_size"
    " micro_train_batch_size ppo_max_token_len_per_gpu max_tokens_per_gpu",
    "packing.max_sequence_length": "max_length max_seq_length max_seq_len model_max_length sequence_len",
    "rollout.num_generations_per_prompt": "num_generations n_samples_per_prompt group_size"
    " rollouts_per_example",
    "rollout.max_new_tokens": "max_completion_length max_response_length response_length",
    "rollout.engine.kv_cache_gib": "gpu_memory_utilization vllm_gpu_memory_utilization",
    "evaluation.interval": "eval_steps val_period test_freq",
    "training.validation_interval": "eval_steps val_period test_freq",
    "checkpoint.interval": "save_steps save_freq save_interval",
    "checkpoint.keep": "save_total_limit keep_top_k",
    "logging.wandb": "report_to use_wandb wandb_project",
    "logging.interval": "logging_steps log_interval",
    "lora": "use_peft use_lora peft_config",
    "lora.rank": "lora_r lora_rank lora_dim",
    "lora.alpha": "lora_alpha",
    "data.train": "dataset_name train_files train_dataset",
    "data.held_out": "val_files eval_dataset test_files",
}


def called_here(name: str) -> list[str]:
    """Return the paths of the settings that do what ``name`` does elsewhere; [] for unknown names."""
    return [path for path, names in _SETTINGS.items() if name in names.split()]
