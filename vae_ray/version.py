"""The version of this package; pyproject.toml reads it here, so that it is known where nothing is installed too."""

VERSION = "0.2.0"
