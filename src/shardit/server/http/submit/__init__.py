"""From a request's body to a stored job."""
