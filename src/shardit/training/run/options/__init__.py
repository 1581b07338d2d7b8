"""Options of a run: flags, TOML files, and their checks before torch is imported."""
