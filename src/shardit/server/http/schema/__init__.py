"""Fields, answers and errors."""
