"""What shardit knows about model families and their folders."""
