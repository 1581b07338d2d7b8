"""What the API process knows."""
