"""What a run is asked for: flags, TOML files, and their checks before torch is imported."""
