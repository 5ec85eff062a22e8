"""docs/configuration.md from the fields themselves: `python -m vae_ray.config.reference > docs/configuration.md`."""

from __future__ import annotations

from vae_ray.config.experiment import field_docs
from vae_ray.config.keys import FieldDoc, flag_of

HEADER = """# Configuration

Every field of an experiment. On the command line a field is a flag, `--optim.lr 3e-4`; in a YAML file it is a key of
its section, `optim: {lr: 3.0e-4}`; in Python a dotted key, `experiment.with_overrides({"optim.lr": 3e-4})`; in a search
space the same key. `vae-ray train --help` prints this list.

An axis (network, prior, likelihood, objective, ...) takes the name of an entry, and the entry's own settings are beside
it: `--likelihood gaussian --likelihood.scale 0.2` is `likelihood: {name: gaussian, scale: 0.2}`. MODULE:NAME is
[your own code](extending.md). Fields marked *place* say where, by whom or how carefully a run is computed, not what it
computes: they may differ when a run is resumed, and a sweep cannot search them. This page is written by
`python -m vae_ray.config.reference`.
"""


def reference() -> str:
    """The page, as Markdown."""
    parts = [HEADER]
    section = ""
    for doc in field_docs():
        if doc.key.partition(".")[0] != section:
            section = doc.key.partition(".")[0]
            parts.append(f"\n## {section}\n\n| field | type | default | meaning |\n|---|---|---|---|\n")
        parts.append(_row(doc))
    return "".join(parts)


def _row(doc: FieldDoc) -> str:
    default = ",".join(map(str, doc.default)) if isinstance(doc.default, tuple) else doc.default
    default_text = "null" if doc.default is None else default
    entry = f"*{doc.entry}:* " if doc.entry else ""
    place = " *place*" if doc.is_place else ""
    kind = doc.type.replace("|", "\\|")
    return f"| `{flag_of(doc.key)}` | {kind} | {default_text} | {entry}{doc.description}{place} |\n"


if __name__ == "__main__":
    import sys

    sys.stdout.write(reference())
