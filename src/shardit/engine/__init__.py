"""Starts rank processes, hands them requests and collects their outputs."""
