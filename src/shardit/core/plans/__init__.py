"""Traces the first call of each kind and derives the plan of messages for later calls."""
