"""Tensor attention: what the polynomial method costs and gives, and what pairs of keys can tell that keys cannot."""
