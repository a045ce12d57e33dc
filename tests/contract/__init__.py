"""Requirements on every registered method; registering a method is enough to test it."""
