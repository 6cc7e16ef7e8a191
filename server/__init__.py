"""What the coordinator runs: cohorts, rounds, sums, checkpoints. No torch, and no user's text."""
