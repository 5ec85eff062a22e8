"""Ray Tune: many trials of one Experiment, ranked by a metric that beta cannot bias."""
