"""HTML pages of runs, sweeps and comparisons, each one file that needs no network."""
