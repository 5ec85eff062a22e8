"""`vae-ray train` as a job: `ray job submit --working-dir . -- python jobs/train.py PRESET ...`"""

import sys

from vae_ray.cli.main import run

if __name__ == "__main__":
    run(["train", *sys.argv[1:]])
