"""Studies of models that were trained elsewhere."""
