"""The sections of an Experiment and the settings of every entry. One sentence a field: meaning, unit, range.

The tables of what the names mean (networks, likelihoods, ...) are in the files that own them; a contract test holds
names here and there equal. No module here imports torch, because `--help` is built from them.
"""
