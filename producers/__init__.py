"""What submits jobs: the Python client and the command line."""
