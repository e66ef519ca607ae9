"""From files of text to Megatron's indexed datasets, restartable at any moment."""
