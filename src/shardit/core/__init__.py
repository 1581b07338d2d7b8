"""Cutting a model at its block calls, and running what was cut: mesh, messages, plans, schedule, request loop."""
