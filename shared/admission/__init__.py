"""Admission: the fleet's say, in Redis, on whether a call may leave now."""
