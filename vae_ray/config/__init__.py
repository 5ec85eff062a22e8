"""The Experiment: one validated description of a run, its presets and search spaces. Imports neither torch nor ray."""
