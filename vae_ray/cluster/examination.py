"""The examination of a cluster by one of its nodes: `python -m vae_ray.cluster.examination [STORAGE]`, run as a job.

The job brings this package to all nodes. It prints one line: `ANSWER` and what `doctor` reads, as JSON.
"""

from __future__ import annotations

import json
import logging
import sys
from dataclasses import asdict
from typing import Any

import ray

from vae_ray.cluster.node_info import clock_offsets, collect_node_info
from vae_ray.cluster.storage_check import check_storage
from vae_ray.distributed.nodes import on_every_node

ANSWER = "vae-ray examination: "


def examine_cluster(storage: str | None) -> dict[str, Any]:
    """The answers of all nodes, their clocks, where the dashboard listens, and the finding about `storage`."""
    context = ray.init(log_to_driver=False, logging_level=logging.CRITICAL)
    answers = on_every_node(collect_node_info)
    return {
        "nodes": [asdict(answer) for answer in answers],
        "clock_offsets": clock_offsets(),
        "dashboard": context.dashboard_url,
        "storage": check_storage(storage, num_nodes=len(answers)).to_dict() if storage else None,
    }


if __name__ == "__main__":
    answer = examine_cluster(sys.argv[1] if len(sys.argv) > 1 else None)
    sys.stdout.write(f"\n{ANSWER}{json.dumps(answer)}\n")
