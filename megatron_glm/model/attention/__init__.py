"""Attention over packed samples whose context is bidirectional: one interface, one file a backend."""
