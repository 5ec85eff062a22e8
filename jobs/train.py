"""`ray job submit --working-dir . -- python jobs/train.py PRESET [--SECTION.FIELD VALUE ...]`

The same command as `vae-ray train`, on the cluster that runs the job: Ray sets RAY_ADDRESS in a job, and the
job's exit code is the command's.
"""

import sys
from pathlib import Path

# The package travels in the job's working directory; no install is needed on the cluster.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from vae_ray.cli.main import run

if __name__ == "__main__":
    run(["train", *sys.argv[1:]])
