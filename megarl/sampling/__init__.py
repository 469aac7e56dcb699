"""From prompts to graded groups: episodes with an environment, rollout batches, prefetching."""
