"""What every rank of a test starts with; see ranks.py."""

import warnings

import torch

import patches

torch.set_num_threads(1)
with warnings.catch_warnings():
    # Said once already, by the process that runs the tests.
    warnings.simplefilter("ignore")
    patches.apply()
