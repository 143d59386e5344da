"""The networks. Their state-dict names are those of published checkpoints; they know neither tiers nor devices."""
