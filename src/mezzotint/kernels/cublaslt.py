"""One product of cuBLASLt's that PyTorch has no function for: FP8 times FP8, GELU behind it, rounded to FP8 at once.

The library is the one that PyTorch has loaded; it is called through its C interface. Names and numbers are those of
cublasLt.h (CUDA 13.0).
"""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from ctypes import byref, c_int, c_int8, c_int32, c_int64, c_size_t, c_uint32, c_uint64, c_void_p, sizeof
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from mezzotint.errors import Unsupported
from mezzotint.kernels.backend import Target
from mezzotint.schemes.rounding import round_e4m3

COMPUTE_32F = 68
TYPES = {torch.float32: 0, torch.bfloat16: 14, torch.float8_e4m3fn: 28}
TRANSPOSED = 1
GELU, GELU_BIAS = 32, 36
TRANSA, EPILOGUE, BIAS_POINTER, A_SCALE, B_SCALE, D_SCALE, FAST_ACCUM, BIAS_TYPE = 3, 7, 8, 17, 18, 20, 25, 26
MAX_WORKSPACE_BYTES = 1
WORKSPACE = 32 << 20
"""Bytes; what NVIDIA advises for Hopper."""
APART = 'inside `mezzotint.use_backend("scaled_mm")` GELU is computed apart.'


class Algorithm(ctypes.Structure):
    """cublasLtMatmulAlgo_t"""

    _fields_ = (("data", c_uint64 * 8),)


class Found(ctypes.Structure):
    """cublasLtMatmulHeuristicResult_t"""

    _fields_ = (
        ("algorithm", Algorithm),
        ("workspace", c_size_t),
        ("state", c_int),
        ("waves", ctypes.c_float),
        ("reserved", c_int * 4),
    )


def missing(target: Target) -> str | None:
    """Why it cannot be called for `target`, or None."""
    if target.kind != "cuda" or target.capability is None:
        return f"needs a CUDA GPU, this is {target}"
    if not target.is_hopper:
        return f"was run on Hopper (sm_90) only, this is {target}"
    try:
        _library()
    except OSError as error:
        return f"finds no cuBLASLt: {error}"
    return None


@cache
def _library() -> ctypes.CDLL:
    """The one that PyTorch has loaded. Raises OSError if there is none of its name."""
    library = ctypes.CDLL(f"libcublasLt.so.{str(torch.version.cuda).partition('.')[0]}")
    library.cublasLtGetStatusString.restype = ctypes.c_char_p
    return library


@custom_op("mezzotint::gelu_product", mutates_args=(), device_types="cuda")
def gelu_product(
    x: Tensor,
    codes: Tensor,
    bias: Tensor | None,
    input_scale: Tensor,
    weight_scale: Tensor,
    inverse: Tensor,
    beside: Tensor | None,
) -> Tensor:
    """See `gelu_product_by_definition`, which says what is computed; e4m3 [rows, beside + out]."""
    out = _place(x, codes, beside)
    before = out.shape[1] - codes.shape[0]
    with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
        if beside is not None:
            from mezzotint.kernels.triton_ops.round import round_into

            round_into(beside, inverse, out)
        _multiply(x, codes, bias, {A_SCALE: weight_scale, B_SCALE: input_scale, D_SCALE: inverse}, out[:, before:])
    return out


def gelu_product_by_definition(
    x: Tensor,
    codes: Tensor,
    bias: Tensor | None,
    input_scale: Tensor,
    weight_scale: Tensor,
    inverse: Tensor,
    beside: Tensor | None,
) -> Tensor:
    """e4m3(gelu(x codes^T * input_scale * weight_scale + bias) * inverse), to the right of e4m3(beside * inverse).

    x, codes        e4m3 [rows, in], [out, in]
    bias            bf16 [out] or None
    *_scale         float32 of one number; inverse is 1 / input_scale of the layer that reads the result
    beside          [rows, any], what that layer reads before its first column from here, or None
    """
    product = x.float() @ codes.float().t() * (input_scale * weight_scale)
    product = product if bias is None else product + bias.float()
    result = round_e4m3(torch.nn.functional.gelu(product, approximate="tanh") * inverse)
    return result if beside is None else torch.cat((round_e4m3(beside.float() * inverse), result), 1)


def _place(x: Tensor, codes: Tensor, beside: Tensor | None) -> Tensor:
    """Memory for the result, [rows, beside + out]."""
    return x.new_empty(x.shape[0], codes.shape[0] + (0 if beside is None else beside.shape[1]))


gelu_product.register_fake(lambda x, codes, *others: _place(x, codes, others[-1]))


def _multiply(x: Tensor, codes: Tensor, bias: Tensor | None, scales: dict[int, Tensor], out: Tensor) -> None:
    """cuBLASLt counts columns first: out^T [out, rows] = codes x^T, with `codes` as it lies transposed."""
    settings: dict[int, Any] = {TRANSA: c_int32(TRANSPOSED), FAST_ACCUM: c_int8(1)}
    settings |= {EPILOGUE: c_uint32(GELU if bias is None else GELU_BIAS)}
    settings |= {name: c_void_p(scale.data_ptr()) for name, scale in scales.items()}
    if bias is not None:
        settings |= {BIAS_POINTER: c_void_p(bias.data_ptr()), BIAS_TYPE: c_int32(TYPES[bias.dtype])}
    workspace = torch.empty(WORKSPACE, dtype=torch.uint8, device=x.device)
    with _made("MatmulDesc", c_int(COMPUTE_32F), c_int(TYPES[torch.float32])) as description:
        for name, value in settings.items():
            _call("MatmulDescSetAttribute", description, c_int(name), byref(value), c_size_t(sizeof(value)))
        with _layout(codes) as a, _layout(x) as b, _layout(out, torch.bfloat16) as c, _layout(out) as d:
            key = (x.device, *x.shape, *codes.shape, out.stride(0), bias is None)
            if key not in _algorithms:
                _algorithms[key] = _best(_handle(x.device), description, a, b, c, d)
            one, zero = ctypes.c_float(1), ctypes.c_float(0)
            nothing = c_void_p(workspace.data_ptr())  # what is added zero times is not read
            _call(
                "Matmul",
                *(_handle(x.device), description),
                *(byref(one), c_void_p(codes.data_ptr()), a, c_void_p(x.data_ptr()), b),
                *(byref(zero), nothing, c, c_void_p(out.data_ptr()), d),
                *(byref(_algorithms[key]), c_void_p(workspace.data_ptr()), c_size_t(WORKSPACE)),
                c_void_p(torch.cuda.current_stream(x.device).cuda_stream),
            )


_algorithms: dict[Any, Algorithm] = {}


def _best(handle: c_void_p, description: c_void_p, *layouts: c_void_p) -> Algorithm:
    """The algorithm that cuBLASLt expects to be the fastest for these shapes."""
    found, count, most = Found(), c_int(), c_size_t(WORKSPACE)
    with _made("MatmulPreference") as preference:
        name = c_int(MAX_WORKSPACE_BYTES)
        _call("MatmulPreferenceSetAttribute", preference, name, byref(most), c_size_t(sizeof(most)))
        wanted = c_int(1)
        _call("MatmulAlgoGetHeuristic", handle, description, *layouts, preference, wanted, byref(found), byref(count))
    if not count.value:
        raise Unsupported("cuBLASLt has no product of FP8 with GELU of these shapes", APART)
    algorithm: Algorithm = found.algorithm
    return algorithm


@cache
def _handle(_device: torch.device) -> c_void_p:
    """The library's state for a device, which is the current one."""
    handle = c_void_p()
    _call("Create", byref(handle))
    return handle


@contextmanager
def _made(kind: str, *arguments: Any) -> Iterator[c_void_p]:
    """One of the library's own objects, for as long as the context is open."""
    made = c_void_p()
    _call(f"{kind}Create", byref(made), *arguments)
    try:
        yield made
    finally:
        _call(f"{kind}Destroy", made)


def _layout(matrix: Tensor, dtype: torch.dtype | None = None) -> Any:
    rows, columns = (c_uint64(side) for side in matrix.shape)
    return _made("MatrixLayout", c_int(TYPES[dtype or matrix.dtype]), columns, rows, c_int64(matrix.stride(0)))


def _call(name: str, *arguments: Any) -> None:
    library = _library()
    status = getattr(library, f"cublasLt{name}")(*arguments)
    if status:
        raise Unsupported(f"cublasLt{name} answers: {library.cublasLtGetStatusString(status).decode()}", APART)
