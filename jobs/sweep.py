"""`vae-ray sweep` as a job: `ray job submit --working-dir . -- python jobs/sweep.py PRESET ...`"""

import sys

from vae_ray.cli.main import run

if __name__ == "__main__":
    run(["sweep", *sys.argv[1:]])
