"""What a run leaves behind for people: images, TensorBoard events and the run's files."""
