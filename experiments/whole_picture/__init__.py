"""Studies that set all methods side by side: which of them to choose, and where each loses."""
