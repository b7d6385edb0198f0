"""The contract and the state that producers and workers agree on."""
