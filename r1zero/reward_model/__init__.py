"""The reward model: a role between rollout and reference, whose model gives each response a value."""
