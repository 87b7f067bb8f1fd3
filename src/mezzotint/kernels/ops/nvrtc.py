"""Compile CUDA C++ with NVRTC and launch it, through NVIDIA's `cuda-bindings`.

NVRTC comes with PyTorch's builds for CUDA, so a user needs no CUDA toolkit. Compiling takes less
than a second. Source: https://docs.nvidia.com/cuda/nvrtc/
"""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from mezzotint.errors import Unsupported
from mezzotint.kernels.target import Target

ARGUMENT_TYPES = {int: ctypes.c_int, Tensor: ctypes.c_void_p, type(None): ctypes.c_void_p}
"""ctypes type per argument type; other arguments, such as tensor maps, convert themselves."""

FALLBACK_HINT = "the model runs without this kernel if you leave out `speed_up` or --fast."


def unavailable_reason(target: Target) -> str | None:
    """Return why kernels cannot be compiled and run on `target`, or None."""
    if target.device_type != "cuda" or target.capability is None:
        return f"needs a CUDA GPU, this is {target}"
    return missing_library()


def missing_library() -> str | None:
    """Return which library is missing to compile and launch kernels, or None."""
    if find_spec("cuda") is None or find_spec("cuda.bindings") is None:
        return (
            "needs cuda-bindings, which comes with PyTorch for CUDA on Linux "
            "(pip install cuda-bindings)"
        )
    from cuda.bindings import nvrtc

    try:
        check_status(nvrtc.nvrtcVersion())
    except RuntimeError as error:  # cuda-bindings finds no shared library
        return f"needs NVRTC, which comes with PyTorch for CUDA on Linux: {error}"
    return None


@dataclass(frozen=True)
class Kernel:
    """A compiled kernel for one device.

    threads        threads per block
    shared_bytes   shared memory per block
    """

    handle: Any
    threads: int
    shared_bytes: int

    def launch(self, blocks: int, device: torch.device, *arguments: Any) -> None:
        """Launch `blocks` blocks on the device's current stream; pass tensors as pointers."""
        from cuda.bindings import driver

        types = tuple(_ctypes_type(argument) for argument in arguments)
        values = tuple(_ctypes_value(argument) for argument in arguments)
        stream = torch.cuda.current_stream(device).cuda_stream
        grid, block = (blocks, 1, 1), (self.threads, 1, 1)
        check_status(
            driver.cuLaunchKernel(
                self.handle, *grid, *block, self.shared_bytes, stream, (values, types), 0
            )
        )


def _ctypes_type(argument: Any) -> Any:
    return next((kind for base, kind in ARGUMENT_TYPES.items() if isinstance(argument, base)), None)


def _ctypes_value(argument: Any) -> Any:
    if isinstance(argument, Tensor):
        return argument.data_ptr()
    return 0 if argument is None else argument


def compile_kernel(
    source: str, name: str, capability: str, threads: int, shared_bytes: int, device: int
) -> Kernel:
    """Compile the kernel `name` for `device`, which must be the current device.

    capability   architecture to compile for, such as "sm_90a"
    Raises       Unsupported with the message of the compiler or driver
    """
    from cuda.bindings import driver

    library = check_status(
        driver.cuLibraryLoadData(compile_to_cubin(source, name, capability), [], [], 0, [], [], 0)
    )
    handle = check_status(driver.cuLibraryGetKernel(library, name.encode()))
    # More than 48 KB of shared memory must be requested for each kernel and device.
    attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    check_status(
        driver.cuKernelSetAttribute(attribute, shared_bytes, handle, driver.CUdevice(device))
    )
    return Kernel(driver.CUfunction(int(handle)), threads, shared_bytes)


def compile_to_cubin(source: str, name: str, capability: str) -> bytes:
    """Compile C++ source to a cubin. Raise Unsupported with NVRTC's log."""
    from cuda.bindings import nvrtc

    program = check_status(
        nvrtc.nvrtcCreateProgram(source.encode(), f"{name}.cu".encode(), 0, [], [])
    )
    try:
        # C++17 for `if constexpr`, by which kernel.cu selects code per variant.
        options = [f"--gpu-architecture={capability}".encode(), b"--std=c++17"]
        (status,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
        if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            raise Unsupported(
                f"NVRTC cannot compile {name} for {capability}: {_compile_log(program)}",
                FALLBACK_HINT,
            )
        code = bytearray(check_status(nvrtc.nvrtcGetCUBINSize(program)))
        check_status(nvrtc.nvrtcGetCUBIN(program, code))
    finally:
        check_status(nvrtc.nvrtcDestroyProgram(program))
    return bytes(code)


def _compile_log(program: Any) -> str:
    from cuda.bindings import nvrtc

    log = bytearray(check_status(nvrtc.nvrtcGetProgramLogSize(program)))
    check_status(nvrtc.nvrtcGetProgramLog(program, log))
    return log.decode().rstrip("\0").strip()


def make_tensor_map(matrix: Tensor, box: Sequence[int]) -> Any:
    """Create a TMA descriptor for boxes of `box` rows and columns, with 128-byte swizzling.

    matrix   e4m3, int8 or bf16 [rows, columns]; rows start at multiples of 16 bytes
    Source   cuTensorMapEncodeTiled, https://docs.nvidia.com/cuda/cuda-driver-api/
    """
    from cuda.bindings import driver

    types = driver.CUtensorMapDataType
    dtype = {
        torch.float8_e4m3fn: types.CU_TENSOR_MAP_DATA_TYPE_UINT8,  # TMA copies bytes
        torch.int8: types.CU_TENSOR_MAP_DATA_TYPE_UINT8,
        torch.bfloat16: types.CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
    }[matrix.dtype]
    uint64, uint32 = driver.cuuint64_t, driver.cuuint32_t
    return check_status(
        driver.cuTensorMapEncodeTiled(
            dtype,
            2,
            matrix.data_ptr(),
            # The driver expects the innermost axis first, and no stride for that axis.
            [uint64(size) for size in reversed(matrix.shape)],
            [uint64(matrix.stride(0) * matrix.element_size())],
            [uint32(size) for size in reversed(box)],
            [uint32(1), uint32(1)],
            driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
            driver.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_128B,
            driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
            # Elements beyond the matrix are loaded as 0, so edge tiles need no code of their own.
            driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        )
    )


def check_status(answer: tuple[Any, ...]) -> Any:
    """Return the result of a `cuda-bindings` call. Raise Unsupported if it failed."""
    status, *results = answer
    if int(status):
        raise Unsupported(f"CUDA error: {status.name}", FALLBACK_HINT)
    return results[0] if results else None
