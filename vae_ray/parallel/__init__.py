"""Data parallelism without Ray: the worker group's protocol, the global batch, sums of gradients."""
