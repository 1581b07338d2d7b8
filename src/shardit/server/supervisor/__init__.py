"""The supervisor: jobs to ranks, and what they return."""
