"""The run directory: records, pictures, TensorBoard events, progress."""
