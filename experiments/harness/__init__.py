"""The first experiments, which prove the harness from end to end; README.md here says what they ask."""
