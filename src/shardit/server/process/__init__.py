"""The API process, its heartbeat, and forced exit."""
