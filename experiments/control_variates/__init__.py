"""Random features and control variates: RFA, FAVOR+, RA, LARA, EVA."""
