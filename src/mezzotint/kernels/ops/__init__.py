"""Our own GPU operations, one folder each, registered as `torch.ops.mezzotint.*`.

A folder holds up to three modules:

reference   what the operation computes, in plain PyTorch; needs neither Triton nor a GPU
kernel      the kernel, in Triton (kernel.py) or CUDA C++ (kernel.cu)
op          the schema of the operation and the launch of its kernel

Importing `op` registers the operation. Where the kernel is in Triton it also imports Triton, which
is installed on Linux only. So backends import `op` when they prepare a weight, and nothing imports
it at the top of a file that a CPU reads.

`dequant_gguf` and `dequant_groups` import Triton when they run. A compiled layer may switch to
them for one call, and what it prepares then must be traceable.
"""
