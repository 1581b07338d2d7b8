"""The first call of a kind, traced, and the plan of messages that follows from it."""
