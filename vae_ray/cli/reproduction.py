"""`vae-ray reproduce`: published results beside what is obtained here. Light until it runs."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from vae_ray import signals
from vae_ray.errors import Stopped, UserError

if TYPE_CHECKING:
    from pathlib import Path

    from vae_ray.reproduction.registry import Entry, Stage

FOLDER = "reproductions"
"""In the storage: the runs of each entry, and by default the results."""


def reproduce(options: argparse.Namespace) -> dict[str, Any]:
    """published results, with their sources, beside what is obtained here; without NAME the list of them"""
    from vae_ray.config.experiment import is_place_key
    from vae_ray.reproduction.registry import load_entry
    from vae_ray.storage.locations import absolute, join_location, local_path

    for key in options.overrides:
        if not is_place_key(key.replace("-", "_")) or key == "run.name":
            raise UserError(
                f"--{key}: reproduce takes the keys that say where and by whom, such as --data.root and --workers.num; "
                "what is trained is the entry's"
            )
    storage = options.storage or options.overrides.pop("run.storage", "runs")
    runs = join_location(absolute(storage, key="run.storage"), FOLDER)
    results = runs if options.results is None else absolute(options.results, key="--results")
    page = None if options.page is None else local_path(options.page, key="--page")
    if page is not None and page.suffix != ".md":
        raise UserError(f"--page: got {options.page!r}, should end in .md")
    if options.name is None:
        for flag, value in (("--stages", options.stages), ("--seeds", options.seeds), ("--dry-run", options.dry_run)):
            if value:
                raise UserError(f"{flag}: needs the NAME of an entry; vae-ray reproduce lists them")
        answer = _list(results) if options.json else {"text": _list_text(results)}
    else:
        entry = load_entry(options.name)
        stages = entry.chosen_stages(options.stages)
        place = {**options.overrides, "run.storage": join_location(runs, entry.name)}
        answer = _reproduce(options, entry, stages, place, results)
    if page is not None and not options.dry_run:
        _write_page(page, results)
    return answer


def _reproduce(
    options: argparse.Namespace, entry: Entry, stages: Sequence[Stage], place: dict[str, Any], results: str
) -> dict[str, Any]:
    from vae_ray.cli.commands import on_ray_workers, print_progress

    seeds = range(options.seeds or 1)
    with signals.deferred():
        from vae_ray.reproduction.measurement import check, placed
        from vae_ray.reproduction.page import cost_of, outcome_text
        from vae_ray.reproduction.reproduce import num_unfinished, reproduce

    names = f"stage{'s' * (len(stages) > 1)} {', '.join(str(entry.stages.index(stage) + 1) for stage in stages)}"
    of_stages = f", {names} of {len(entry.stages)}" if len(entry.stages) > 1 else ""
    sys.stderr.write(f"vae-ray: {entry.name}{of_stages}: {cost_of(entry, stages, len(seeds))} on two CPU cores\n")
    check(entry, stages, seeds, place)
    todo, num = num_unfinished(entry, stages, seeds, place), len(stages) * len(seeds) * len(entry.runs)
    sys.stderr.write(f"vae-ray: {num - todo} of {num} runs are already trained and evaluated\n")
    runs = [(stage, run, seed) for stage in stages for seed in seeds for run in entry.runs]
    experiments = [placed(entry.experiment(*each), place) for each in runs]
    if options.dry_run:
        if options.json:
            found = [each.to_dict() for each in experiments]
            minutes = len(seeds) * entry.minutes(list(stages))
            return {"entry": entry.name, "minutes": minutes, "unfinished": todo, "experiments": found}
        return {"text": "\n".join(f"# {each.run.name}\n{each.to_yaml()}" for each in experiments)}
    num_workers = experiments[0].workers.num if "workers.num" in options.overrides else 0
    on_ray = on_ray_workers(num_workers if isinstance(num_workers, int) else 0)
    try:
        outcomes = reproduce(entry, stages, seeds, place=place, results=results, progress=print_progress(), **on_ray)
    except Stopped as error:
        raise Stopped(f"{str(error).partition(';')[0]}; continue with the same command") from None
    options.exit_code = 0 if all(outcome.is_reproduced for outcome in outcomes) else 1
    if options.json:
        return {"entry": entry.name, "source": entry.source, "outcomes": [outcome.to_dict() for outcome in outcomes]}
    lines = [f"{entry.title}\nSource: {entry.source}", *(outcome_text(entry, outcome) for outcome in outcomes)]
    return {"text": "\n".join([*lines, f"kept in {results}"])}


def _list(results: str) -> dict[str, Any]:
    from vae_ray.reproduction.outcome import kept_outcomes
    from vae_ray.reproduction.registry import all_entries

    return {
        "results": results,
        "entries": [
            {
                **entry.model_dump(exclude_none=True),
                "outcomes": [outcome.to_dict() for outcome in kept_outcomes(entry, results)],
            }
            for entry in all_entries()
        ],
    }


def _list_text(results: str) -> str:
    from vae_ray.reproduction.outcome import kept_outcomes
    from vae_ray.reproduction.page import cost_of, outcome_text, reference_text, target_text
    from vae_ray.reproduction.registry import all_entries

    lines = []
    for entry in all_entries():
        target = entry.stages[-1].targets[-1]
        lines.append(f"{entry.name}: {entry.title}\n  source: {entry.source}")
        lines.append(f"  reference: {target_text(target)} {reference_text(target)}")
        for number, stage in enumerate(entry.stages, start=1):
            name = f"stage {number}" if len(entry.stages) > 1 else "cost"
            lines.append(f"  {name}: {cost_of(entry, [stage], 1)} a seed; {stage.what}")
        lines += ["  kept result: " + outcome_text(entry, outcome) for outcome in kept_outcomes(entry, results)]
    return "\n".join([*lines, f"results are kept in {results}; run one with: vae-ray reproduce NAME"])


def _write_page(page: Path, results: str) -> None:
    from vae_ray.errors import TrainingFailed
    from vae_ray.reproduction.outcome import kept_outcomes
    from vae_ray.reproduction.page import page as render
    from vae_ray.reproduction.registry import all_entries
    from vae_ray.storage.atomic import atomic_write

    entries = all_entries()
    text = render(entries, {entry.name: kept_outcomes(entry, results) for entry in entries})
    try:
        page.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(page, text.encode())
    except OSError as error:
        raise TrainingFailed(f"--page: {page} could not be written ({error.strerror})") from None
