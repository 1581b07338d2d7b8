"""Kinds of models that ranks run. A task checks and loads a model over ranks, runs requests and collects results."""
