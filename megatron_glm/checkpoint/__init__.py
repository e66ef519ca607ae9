"""GLM's weights in every format: one table of tensors, read in both directions."""
