"""Results: outputs, files and their metadata."""
