"""The first experiments, which prove the harness from end to end."""
