"""The processes of a server: their loop, heartbeat and end."""
