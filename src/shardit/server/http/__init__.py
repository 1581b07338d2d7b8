"""The HTTP side of a server: a process of its own that checks requests, stores them as jobs and answers from the store.
It imports no torch, so that it starts at once and answers while ranks load."""
