"""Settings of every test of the data side."""

import logging

from hypothesis import settings

# Machines that run these tests are busy: an example may take its time.
settings.register_profile("no deadline", deadline=None)
settings.load_profile("no deadline")

# Megatron says at every config what it understood.
logging.getLogger("megatron.core").setLevel(logging.WARNING)
