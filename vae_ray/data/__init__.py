"""From a named source to batches: decoded once per node into Arrow, then whole-tensor gathers."""
