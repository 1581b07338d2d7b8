"""The job store: SQLite and files."""
