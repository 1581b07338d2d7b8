"""How a server is started."""
