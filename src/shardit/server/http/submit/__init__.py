"""Turns the body of a request into a stored job."""
