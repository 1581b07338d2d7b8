"""`shardit serve`: jobs that survive crashes, an HTTP interface over them, and ranks that are restarted when they fail.
Nothing here imports torch: only the ranks do."""
