"""Jobs in SQLite and files."""
