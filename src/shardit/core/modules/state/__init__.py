"""State that modules, processors and hooks keep from call to call: read, compared, put back."""
