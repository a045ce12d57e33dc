"""What theory and papers claim of coresets of attention and of compressed caches."""
