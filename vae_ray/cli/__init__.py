"""The command line: arguments, one command, one answer, one exit code."""
