"""Settings, each declared once: with its default, help and check. Flags, request fields and docs follow."""
