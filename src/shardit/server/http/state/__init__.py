"""State of the API process."""
