"""What a run would need and move on GPUs that need not exist: `megarl plan` (docs/plan.md)."""
