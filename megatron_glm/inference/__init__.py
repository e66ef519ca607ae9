"""Filling blanks: prefill, decode, search, and a server."""
