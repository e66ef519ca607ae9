"""Training steps of several models in processes that take turns, measured alike."""
