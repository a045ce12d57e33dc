"""The documentation site, which `make docs` builds."""
