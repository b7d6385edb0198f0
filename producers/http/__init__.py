"""The HTTP producer: doors for whoever does not speak Python."""
