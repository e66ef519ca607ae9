"""What makes Megatron-Core the trainer of GLM-130B-style models."""
