"""Jobs and machines: submission, dashboard, diagnosis. May import ray."""
