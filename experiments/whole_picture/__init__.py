"""All methods on the same ground: what each gives, what it costs, and where it loses."""
