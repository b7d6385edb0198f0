"""Servers and the sandbox provider as child processes, for the demo, tests and `sluice up`."""
