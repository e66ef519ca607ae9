"""What a training run will take before it is started: memory, operations and time."""
