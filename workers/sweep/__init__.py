"""The periodic repair and staging: each loop is a class, and safe to run twice at once."""
