"""Cutting a model at its block calls, and running what was cut: mesh, communication, call sites, schedule, request
loop."""
