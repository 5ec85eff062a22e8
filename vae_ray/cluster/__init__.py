"""Jobs and machines: submission, upload, dashboard, diagnosis. May import ray."""
