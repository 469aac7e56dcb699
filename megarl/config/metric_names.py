"""Names in metrics.jsonl by kind of run, for fields that name a metric (docs/metrics.md explains them)."""

from __future__ import annotations

import re
from collections.abc import Collection


def _set(names: str) -> frozenset[str]:
    return frozenset(names.split())


STEP = _set(
    """
    loss grad_norm lr non_finite_weights num_tokens num_microbatches tokens_per_second_train peak_memory_gib
    num_split_sequences num_whole_sequences expert_load_max router_aux_loss seconds_checkpoint_blocked seconds
    seconds_rollout seconds_reward seconds_logprobs seconds_train seconds_weights seconds_other
    memory_parameters_gib memory_gradients_gib memory_optimizer_gib memory_reference_gib memory_merged_gib
    memory_activations_gib memory_other_gib memory_allocated_gib memory_reserved_gib memory_resident_gib
    """
)
SFT = STEP | _set("entropy validation_loss")
_PAIRS = STEP | _set(
    """
    reward_chosen reward_rejected reward_margin reward_accuracy validation_loss validation_accuracy
    validation_margin
    """
)
DPO = _PAIRS | _set("entropy logps_chosen logps_rejected sft_loss kl")
RM = _PAIRS | _set("center_loss")
ONLINE = STEP | _set(
    """
    entropy accuracy reward_mean reward_std reward_min reward_max zero_std_groups_fraction
    response_length_mean response_length_max truncated_fraction episodes_retried episodes_dropped
    groups_dropped turns_mean turns_max num_computed_tokens tokens_per_second_rollout weights_bytes_moved
    policy_version logprob_abs_diff_mean logprob_abs_diff_max kl_rollout_trainer level
    memory_engine_parameters_gib memory_engine_kv_cache_gib memory_engine_allocated_gib
    memory_engine_resident_gib memory_environments_resident_gib
    """
)
DISTILL = ONLINE | _set("divergence_max")
_POLICY = ONLINE | _set(
    """
    policy_loss advantage_mean ratio_mean ratio_max clip_fraction dual_clip_fraction kl_policy kl_reward
    """
)
PPO = _POLICY | _set(
    """
    value_loss value_mean value_clip_fraction critic_grad_norm critic_lr critic_non_finite_weights return_mean
    explained_variance memory_critic_gib
    """
)
GRPO = _POLICY | _set(
    """
    greedy_reward_mean kl_ref nll_positive drift correction_weight_mean corrected_fraction
    rejected_fraction positive_fraction filtered_overlong dropped_logprob_error skipped_zero_advantage
    shaped_reward_mean
    advantage_clipped_fraction num_generation_batches equal_groups surplus_groups staleness_mean staleness_max
    stale_tokens_fraction mixed_samples_fraction stale_logprob_abs_diff_mean stale_kl_rollout_trainer
    router_replay_rerouted
    """
)
_MADE = re.compile(r"(pass|cons)_at_[1-9]\d*|level_.+")  # by evaluation.k, and by the sources of a mixture


def is_metric(name: str, names: Collection[str]) -> bool:
    """Return whether a run that logs ``names`` may log ``name``."""
    return name in names or ("accuracy" in names and _MADE.fullmatch(name) is not None)
