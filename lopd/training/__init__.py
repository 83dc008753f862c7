"""Training: objective, step, batches, loop, checkpoints, logs, memory plan."""
