"""CUDA C++ to something that can be launched: NVRTC and the driver, through NVIDIA's `cuda-bindings`."""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from mezzotint.errors import Unsupported
from mezzotint.kernels.backend import Target

KINDS = {int: ctypes.c_int, Tensor: ctypes.c_void_p, type(None): ctypes.c_void_p}
"""What arguments of each type are handed over as; anything else, such as a tensor map, knows for itself."""

WITHOUT = "a model runs without it unless `speed_up` or `generate --fast` makes it fast."


def missing(target: Target) -> str | None:
    """Why nothing can be compiled for and run on `target`, or None."""
    if target.kind != "cuda" or target.capability is None:
        return f"needs a CUDA GPU, this is {target}"
    if find_spec("cuda") is None or find_spec("cuda.bindings") is None:
        return "needs cuda-bindings, which comes with PyTorch for CUDA on Linux (pip install cuda-bindings)"
    from cuda.bindings import nvrtc

    try:
        checked(nvrtc.nvrtcVersion())
    except RuntimeError as error:
        return f"finds no NVRTC, which comes with PyTorch for CUDA on Linux: {error}"
    return None


@dataclass(frozen=True)
class Kernel:
    """A compiled function, for one device.

    threads        of a block
    shared_bytes   shared memory of a block
    """

    handle: Any
    threads: int
    shared_bytes: int

    def launch(self, blocks: int, device: torch.device, *arguments: Any) -> None:
        """Run it on so many blocks, on the device's current stream. Tensors are handed over as pointers."""
        from cuda.bindings import driver

        kinds = tuple(
            next((kind for own, kind in KINDS.items() if isinstance(argument, own)), None) for argument in arguments
        )
        values = tuple(
            argument.data_ptr() if isinstance(argument, Tensor) else 0 if argument is None else argument
            for argument in arguments
        )
        stream = torch.cuda.current_stream(device).cuda_stream
        checked(
            driver.cuLaunchKernel(
                self.handle, blocks, 1, 1, self.threads, 1, 1, self.shared_bytes, stream, (values, kinds), 0
            )
        )


def compiled(source: str, name: str, capability: str, threads: int, shared_bytes: int, device: int) -> Kernel:
    """The function called `name` in C++ source, for one device, which is the current one.

    capability   what machine code is made for, such as "sm_90a"
    Raises       Unsupported with the compiler's or the driver's words
    """
    from cuda.bindings import driver

    library = checked(driver.cuLibraryLoadData(machine_code(source, name, capability), [], [], 0, [], [], 0))
    handle = checked(driver.cuLibraryGetKernel(library, name.encode()))
    most = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    checked(driver.cuKernelSetAttribute(most, shared_bytes, handle, driver.CUdevice(device)))
    return Kernel(driver.CUfunction(int(handle)), threads, shared_bytes)


def machine_code(source: str, name: str, capability: str) -> bytes:
    """What NVRTC makes of C++ source with a function called `name`. Raises Unsupported in NVRTC's words."""
    from cuda.bindings import nvrtc

    program = checked(nvrtc.nvrtcCreateProgram(source.encode(), f"{name}.cu".encode(), 0, [], []))
    try:
        options = [f"--gpu-architecture={capability}".encode(), b"--std=c++17"]
        (status,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
        if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            log = bytearray(checked(nvrtc.nvrtcGetProgramLogSize(program)))
            checked(nvrtc.nvrtcGetProgramLog(program, log))
            said = log.decode().rstrip("\0").strip()
            raise Unsupported(f"NVRTC cannot compile {name} for {capability}: {said}", WITHOUT)
        code = bytearray(checked(nvrtc.nvrtcGetCUBINSize(program)))
        checked(nvrtc.nvrtcGetCUBIN(program, code))
    finally:
        checked(nvrtc.nvrtcDestroyProgram(program))
    return bytes(code)


def tensor_map(matrix: Tensor, box: Sequence[int]) -> Any:
    """How the copy engine finds its way in a matrix: boxes of `box` rows and columns, swizzled by 128 bytes.

    matrix   e4m3 or bf16 [rows, columns], columns dense, rows a multiple of 16 bytes apart
    """
    from cuda.bindings import driver

    kinds = driver.CUtensorMapDataType
    kind = {
        torch.float8_e4m3fn: kinds.CU_TENSOR_MAP_DATA_TYPE_UINT8,
        torch.bfloat16: kinds.CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
    }[matrix.dtype]
    far, near = driver.cuuint64_t, driver.cuuint32_t
    return checked(
        driver.cuTensorMapEncodeTiled(
            kind,
            2,
            matrix.data_ptr(),
            [far(side) for side in reversed(matrix.shape)],
            [far(matrix.stride(0) * matrix.element_size())],
            [near(side) for side in reversed(box)],
            [near(1), near(1)],
            driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
            driver.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_128B,
            driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
            driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        )
    )


def checked(answer: tuple[Any, ...]) -> Any:
    """What a function of `cuda-bindings` has answered. Raises Unsupported if that is an error."""
    status, *results = answer
    if int(status):
        raise Unsupported(f"CUDA answers {status.name}", WITHOUT)
    return results[0] if results else None
