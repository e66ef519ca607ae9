"""What tests change in a run of a tool: how it cuts its inputs, and how it ends.

A module of its own, since the processes of `forked` import it and must not import torch.
"""

import os
import resource
import signal
import time

from megatron_glm.data.preprocessing import blocks
from megatron_glm.data.preprocessing.encoding import Encoder


def use_small_blocks():
    blocks.BLOCK_BYTES = 2000


def use_small_documents():
    blocks.BLOCK_BYTES, blocks.MAX_DOCUMENT_BYTES = 2000, 10000


def die_at_call(number):
    """kill -9 at the n-th call that makes something durable or visible."""
    use_small_blocks()
    calls = 0

    def counted(function):
        def call(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return call

    os.fsync, os.replace = counted(os.fsync), counted(os.replace)
    os.unlink, os.rmdir = counted(os.unlink), counted(os.rmdir)


def encode_slowly():
    use_small_blocks()
    encode = Encoder.encode

    def slow(self, block):
        time.sleep(0.3)
        return encode(self, block)

    Encoder.encode = slow


def fill_the_disk(num_bytes):
    """No file may become longer."""
    use_small_blocks()
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, num_bytes))
