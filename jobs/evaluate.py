"""`ray job submit --working-dir . -- python jobs/evaluate.py CHECKPOINT [--split test]`

The same command as `vae-ray evaluate`, on the head node of the cluster, which must see CHECKPOINT; the job's exit code
is the command's.
"""

import sys
from pathlib import Path

# The package travels in the job's working directory; no install is needed on the cluster.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from vae_ray.cli.main import run

if __name__ == "__main__":
    run(["evaluate", *sys.argv[1:]])
