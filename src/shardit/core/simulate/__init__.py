"""Schedules replayed without processes."""
