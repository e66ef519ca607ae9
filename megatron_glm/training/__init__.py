"""What one training step needs beside Megatron: its batch, its loss, what a checkpoint stores."""
