"""Low rank: sketches, projections, and the spectra that bound them."""
