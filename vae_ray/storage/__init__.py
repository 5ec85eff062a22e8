"""Where runs and raw files are: in a directory that all nodes see, or at a URI of an object store."""
