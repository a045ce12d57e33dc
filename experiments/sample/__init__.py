"""Makes the q, k, v that ship with the package: a byte-level language model, trained here, and its captured attention."""
