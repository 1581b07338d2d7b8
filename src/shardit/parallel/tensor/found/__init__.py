"""Finds from its forward how a module with linears that no rule names can be cut."""
