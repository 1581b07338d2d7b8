"""Communication among ranks: the mesh, messages, collectives, comparison."""
