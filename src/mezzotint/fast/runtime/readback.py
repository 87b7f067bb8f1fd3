"""Read values from the GPU without waiting for later work."""

from collections.abc import Callable

import torch
from torch import Tensor


def read_back(flag: Tensor) -> Callable[[], bool]:
    """Start to copy a flag [] to the CPU. Return a function that waits for it and returns it.

    The function does not wait for work that the GPU was given after this call.
    """
    if not flag.is_cuda:
        return lambda: bool(flag)
    # Only a copy into pinned memory is asynchronous.
    target = torch.empty_like(flag, device="cpu", pin_memory=True)
    target.copy_(flag, non_blocking=True)
    copied = torch.cuda.current_stream(flag.device).record_event()

    def wait() -> bool:
        copied.synchronize()
        return bool(target)

    return wait
