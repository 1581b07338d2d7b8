"""Model families and their folders."""
