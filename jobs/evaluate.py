"""`vae-ray evaluate` as a job: `ray job submit --working-dir . -- python jobs/evaluate.py CHECKPOINT ...`"""

import sys

from vae_ray.cli.main import run

if __name__ == "__main__":
    run(["evaluate", *sys.argv[1:]])
