"""Results, events and waiting."""
