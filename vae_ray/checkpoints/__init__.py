"""The checkpoint format: saving, loading, finding and quarantine."""
