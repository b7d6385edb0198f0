"""What runs the jobs: pools, adapters, the sweep and the embedded servers."""
