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
    shown = f"{number:.0f}" if number >= 1.5 else "1"
    return f"about {shown} {unit}{'' if shown == '1' else 's'}{'' if is_measured else ' (estimated)'}"


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
    head = "| entry | what | obtained | verdict |\n|---|---|---|---|"
    sections = [_section(entry, outcomes.get(entry.name, ())) for entry in entries]
    return "\n".join([INTRODUCTION, head, *rows, "", "\n\n".join(sections)]) + "\n"


def _summary(entry: Entry, outcomes: Sequence[Outcome]) -> str:
    """The row of an entry: of its last stage that was run the last target, which is the one that matters most."""
    link = f"[{entry.name}](#{entry.name})"
    if not outcomes:
        return f"| {link} | {entry.title} | – | not run |"
    last = outcomes[-1]
    each = last.obtained[-1]
    number = f"{target_text(each.target)}, stage {last.stage} of {len(entry.stages)}"
    name = number if len(entry.stages) > 1 else target_text(each.target)
    return f"| {link} | {entry.title} | {each.text} ({name}) | {_state(last)} |"


def _state(outcome: Outcome) -> str:
    states = [each.is_reproduced for each in outcome.obtained if each.is_reproduced is not None]
    if not states:
        return "nothing published of this stage"
    if all(states):
        return "reproduced"
    return f"{states.count(False)} of {len(states)} outside of the tolerance"


def _section(entry: Entry, outcomes: Sequence[Outcome]) -> str:
    lines = [f"## {entry.name}", "", f"{entry.title}. Source: {entry.source}.", "", entry.protocol.strip()]
    by_stage = {outcome.stage: outcome for outcome in outcomes}
    for number, stage in enumerate(entry.stages, start=1):
        title = f"{_stage_title(entry, number)}{stage.what}."
        cost = cost_of(entry, [stage], 1)
        if number in by_stage:
            lines += ["", f"{title} {_how(by_stage[number])}", "", _table(by_stage[number].obtained)]
            lines += [f"\nWarning: {line}" for line in by_stage[number].warnings]
        else:
            references = "; ".join(f"{target_text(t)}: {reference_text(t)}" for t in stage.targets if t.reference)
            why = f": {stage.not_run}" if stage.not_run else ""
            lines += ["", f"{title} {references or 'Nothing was published of it'}. Not run ({cost} a seed){why}."]
    return "\n".join([*lines, *(["", entry.notes.strip()] if entry.notes else [])])


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
