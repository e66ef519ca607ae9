"""Whether there is a GPU to compute on; `python -m megatron_glm.device` prints gpu or cpu."""

import os
import warnings
from pathlib import Path

import torch

from megatron_glm.errors import GLMError, exit_with_one_line

DEVICE_FILES = Path("/dev")


def has_gpu() -> bool:
    """True where torch can use a GPU, False where there is none or CUDA_VISIBLE_DEVICES is empty.

    GLMError where there is one that torch cannot use: days may pass until somebody wonders why a
    run on the CPU is slow, and a job of many machines would wait for the one that has none.
    """
    with warnings.catch_warnings(record=True) as reasons:
        warnings.simplefilter("always")
        if torch.cuda.is_available():
            return True
    if os.environ.get("CUDA_VISIBLE_DEVICES") == "" or not any(DEVICE_FILES.glob("nvidia[0-9]*")):
        return False
    reason = " ".join(str(reasons[-1].message).split()) if reasons else "torch does not say why"
    raise GLMError(
        f"this machine has a GPU that torch {torch.__version__} cannot use ({reason}); renew its "
        "driver, or set CUDA_VISIBLE_DEVICES= to use the CPU on purpose"
    )


if __name__ == "__main__":
    with exit_with_one_line():
        print("gpu" if has_gpu() else "cpu")
