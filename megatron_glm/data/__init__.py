"""From indexed files of tokens to packed sequences of blanks."""
