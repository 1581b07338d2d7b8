"""Replays schedules without processes."""
