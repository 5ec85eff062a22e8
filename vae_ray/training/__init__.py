"""The training loop, optimisation, exact metrics and checkpoints. Knows nothing of Ray."""
