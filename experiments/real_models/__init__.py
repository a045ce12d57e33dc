"""What approximations do inside models: trained here, or brought by the user."""
