"""What the server of `forked` has ready for every run of a tool."""

# ruff: noqa: F401
import sys

import pyarrow.compute
import pyarrow.parquet

import tests.tools.faults
import tests.tools.forked
import tools.preprocess_data
import tools.train_tokenizer
from megatron_glm.data.codecs import words

# All of Unicode, which every worker would need by its first text that is not ASCII.
words._finder(words.GPT2_WORDS, sys.maxunicode + 1)
