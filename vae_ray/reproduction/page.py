"""Kept outcomes as text: the lines of the command, and the Markdown page that shows every entry of the registry."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from vae_ray.evaluation.table import with_unit
from vae_ray.reproduction.outcome import Obtained, Outcome
from vae_ray.reproduction.registry import Entry, Stage, Target

INTRODUCTION = """\
# Published results, and what was obtained here

Rendered by `vae-ray reproduce --page FILE.md` from kept results ([reproduce.md](reproduce.md)); do not edit it. "±" is
half of a 95 % interval of the mean over seeds by Student's t or, of one seed, the standard error over images. What is
not run, and what is outside of its tolerance, is here too.
"""


def cost_text(minutes: float, *, is_measured: bool) -> str:
    """An expected cost as one reads it: "about 3 hours (estimated)"."""
    number, unit = (minutes / 60, "hour") if minutes >= 100 else (minutes, "minute")
    shown = f"{max(1, number):.0f}"
    plural = "" if shown == "1" else "s"
    return f"about {shown} {unit}{plural}{'' if is_measured else ' (estimated)'}"


def cost_of(entry: Entry, stages: Sequence[Stage], num_seeds: int) -> str:
    """What stages are expected to take with so many seeds, on two CPU cores."""
    minutes = num_seeds * entry.minutes(list(stages))
    return cost_text(minutes, is_measured=all(stage.cost == "measured" for stage in stages))


def reference_text(target: Target) -> str:
    """What was published: `86.76 nats ± 1`, `below 0.00 nats`, or a dash."""
    if target.reference is None:
        return "–"
    value = with_unit(target.metric, target.reference)
    return f"{target.side} {value}" if target.tolerance is None else f"{value}, ± {target.tolerance:g}"


def target_text(target: Target) -> str:
    """What is measured: `test/nll of vamp − standard`."""
    run = target.run if target.minus is None else f"{target.run} − {target.minus}"
    epoch = "" if target.epoch is None else f", epoch {target.epoch}"
    return f"{target.metric}{f' of {run}' if run else ''}{epoch}"


def outcome_text(entry: Entry, outcome: Outcome) -> str:
    """The lines of the command for one stage."""
    stage = entry.stages[outcome.stage - 1]
    lines = [f"{_stage_title(entry, outcome.stage)}{stage.what}"]
    for each in outcome.obtained:
        lines.append(f"  {target_text(each.target)}: reference {reference_text(each.target)}; obtained {each.text}")
        lines.append(f"    {each.verdict}")
    return "\n".join([*lines, *(f"  warning: {line}" for line in outcome.warnings)])


def _stage_title(entry: Entry, number: int) -> str:
    return f"Stage {number} of {len(entry.stages)}: " if len(entry.stages) > 1 else ""


def page(entries: Sequence[Entry], outcomes: Mapping[str, Sequence[Outcome]]) -> str:
    """The Markdown page: a table of all entries, then one section each; `outcomes` by the entry's name."""
    rows = [_summary(entry, outcomes.get(entry.name, ())) for entry in entries]
    head = "| entry | what | reference | obtained | |\n|---|---|---|---|---|"
    sections = [_section(entry, outcomes.get(entry.name, ())) for entry in entries]
    return "\n".join([INTRODUCTION, head, *rows, "", "\n\n".join(sections)]) + "\n"


def _summary(entry: Entry, outcomes: Sequence[Outcome]) -> str:
    """The row of an entry: the last target of its last stage, and of the last stage that was run."""
    published = entry.stages[-1].targets[-1]
    cells = [f"[{entry.name}](#{entry.name})", entry.title]
    cells.append(f"{target_text(published)}: {reference_text(published)}{_after(entry, len(entry.stages))}")
    if outcomes:
        cells += [f"{outcomes[-1].obtained[-1].text}{_after(entry, outcomes[-1].stage)}", _state(entry, outcomes[-1])]
    else:
        cells += ["–", f"not run: {entry.stages[-1].not_run}".removesuffix(": ")]
    return f"| {' | '.join(cells)} |"


def _after(entry: Entry, stage: int) -> str:
    return f" (stage {stage} of {len(entry.stages)})" if len(entry.stages) > 1 else ""


def _state(entry: Entry, outcome: Outcome) -> str:
    """In a few words, how the last stage that was run went."""
    if outcome.stage < len(entry.stages):
        return f"this stage: {outcome.obtained[-1].verdict}"
    states = [each.is_reproduced for each in outcome.obtained if each.target.reference is not None]
    missing = {"outside of the tolerance": states.count(False), "not decided": states.count(None)}
    return ", ".join(f"{num} of {len(states)} {what}" for what, num in missing.items() if num) or "reproduced"


def _section(entry: Entry, outcomes: Sequence[Outcome]) -> str:
    lines = [f"## {entry.name}", "", f"{entry.title}. Source: {entry.source}.", "", entry.protocol.strip()]
    by_stage, not_run = {outcome.stage: outcome for outcome in outcomes}, []
    for number, stage in enumerate(entry.stages, start=1):
        if number in by_stage:
            lines += ["", *_stage_lines(entry, by_stage[number])]
        elif references := [each for each in stage.targets if each.reference is not None]:
            published = "; ".join(f"{target_text(each)} {reference_text(each)}" for each in references)
            why = f": {stage.not_run}" if stage.not_run else ""
            cost = f"{_stage_title(entry, number)}{stage.what}. Not run ({cost_of(entry, [stage], 1)} a seed){why}."
            lines += ["", f"{cost} Reference: {published}."]
        else:
            not_run.append(str(number))
    if not_run:
        lines += ["", f"Not run, and nothing published of them: stages {', '.join(not_run)}."]
    return "\n".join([*lines, *(["", entry.notes.strip()] if entry.notes else [])])


def _stage_lines(entry: Entry, outcome: Outcome) -> list[str]:
    title = f"{_stage_title(entry, outcome.stage)}{entry.stages[outcome.stage - 1].what}."
    lines = [f"{title} {_how(outcome)}", "", _table(outcome.obtained)]
    return lines + [f"\nWarning: {line}" for line in outcome.warnings]


def _how(outcome: Outcome) -> str:
    """Command, machine and date."""
    seeds = "seed" if len(outcome.seeds) == 1 else "seeds"
    machine = outcome.machine
    return (
        f"`{outcome.command}`, {seeds} {', '.join(map(str, outcome.seeds))}, {outcome.date}: "
        f"{outcome.training_seconds / 60:,.1f} minutes of training on {machine['cpu']}, {machine['cores']} cores, "
        f"torch {machine['torch']}, vae_ray {machine['vae_ray']}."
    )


def _table(obtained: Sequence[Obtained]) -> str:
    rows = ["| | reference | obtained | | why this reference and tolerance |", "|---|---|---|---|---|"]
    for each in obtained:
        target = each.target
        cells = [target_text(target), reference_text(target), each.text, each.verdict, target.why or "–"]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)
