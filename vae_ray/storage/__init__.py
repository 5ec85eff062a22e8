"""Where runs and raw files lie: a directory that all nodes see, or a URI of an object store."""
