"""`train`: an Experiment becomes a finished run directory."""
