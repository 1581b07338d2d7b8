"""State that modules, processors and hooks keep between calls: read, compared, restored."""
