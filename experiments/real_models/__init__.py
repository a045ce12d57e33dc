"""Methods inside models: trained here on questions about contexts, or trained elsewhere."""
