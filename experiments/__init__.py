"""Small models trained to check what the methods promise."""
