"""Makes the q, k, v that ship with the package: trains a byte-level language model and captures its attention."""
