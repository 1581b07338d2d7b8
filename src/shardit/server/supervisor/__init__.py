"""The supervisor: dispatches jobs to ranks and stores their results."""
