"""Adapters: one module a wire format, over the official SDKs."""
