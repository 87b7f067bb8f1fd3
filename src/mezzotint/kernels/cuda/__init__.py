"""Our own GPU kernels in CUDA C++, for what Triton has no words for. Each has its source beside it.

They are compiled where they run, by the NVRTC that comes with PyTorch, in less than a second.
"""
