"""What cuBLASLt is asked, by a stand-in for the library; tests/test_gpu.py has the product itself."""

import ctypes
from collections import Counter
from typing import Any

import pytest
import torch

from mezzotint.errors import Unsupported
from mezzotint.kernels import cublaslt

WORDS = {"TRANSA": 3, "EPILOGUE": 7, "FAST_ACCUM": 25, "BIAS_TYPE": 26}
POINTERS = {"BIAS_POINTER": 8, "A_SCALE": 17, "B_SCALE": 18, "D_SCALE": 20}


class Library:
    """Writes down what it is called with; `fails` is the function that answers with an error."""

    def __init__(self, fails: str = "") -> None:
        self.fails = fails
        self.attributes: dict[int, bytes] = {}
        self.layouts: list[tuple[int, ...]] = []
        self.calls: Counter[str] = Counter()
        self.product: list[int | None] = []

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("cublasLt"):
            raise AttributeError(name)

        def function(*arguments: Any) -> int:
            self.calls[name] += 1
            getattr(self, f"_{name.removeprefix('cublasLt')}", lambda *_: None)(*arguments)
            return 15 if name == self.fails else 0

        function.restype = None  # type: ignore[attr-defined]
        return function

    def cublasLtGetStatusString(self, status: int) -> bytes:
        return f"status {status}".encode()

    def _MatmulDescSetAttribute(self, _description: Any, name: Any, value: Any, size: Any) -> None:
        self.attributes[name.value] = ctypes.string_at(value, size.value)

    def _MatrixLayoutCreate(self, _made: Any, *layout: Any) -> None:
        self.layouts.append(tuple(number.value for number in layout))

    def _MatmulAlgoGetHeuristic(self, *arguments: Any) -> None:
        ctypes.cast(arguments[-1], ctypes.POINTER(ctypes.c_int))[0] = int(self.fails != "found")

    def _Matmul(self, *arguments: Any) -> None:
        self.product = [argument.value for argument in arguments if isinstance(argument, ctypes.c_void_p)]


@pytest.fixture
def ask(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Multiplies with a stand-in: (library, x, codes, bias, scales, out)."""
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _device: type("Stream", (), {"cuda_stream": 7}))

    def multiply(fails: str = "", biased: bool = True) -> Any:
        library = Library(fails)
        monkeypatch.setattr(cublaslt, "_library", lambda: library)
        monkeypatch.setattr(cublaslt, "_algorithms", {})
        cublaslt._handle.cache_clear()
        x, codes = (torch.zeros(side, 32, dtype=torch.float8_e4m3fn) for side in (5, 48))
        bias = torch.zeros(48, dtype=torch.bfloat16) if biased else None
        scales = {POINTERS[name]: torch.ones(1) for name in ("A_SCALE", "B_SCALE", "D_SCALE")}
        out = torch.zeros(5, 64, dtype=torch.float8_e4m3fn)[:, 16:]
        cublaslt._multiply(x, codes, bias, scales, out)
        return library, x, codes, bias, scales, out

    return multiply


@pytest.mark.parametrize("biased", [False, True])
def test_what_the_library_is_asked(ask: Any, biased: bool) -> None:
    library, x, codes, bias, scales, out = ask(biased=biased)
    words = {"TRANSA": 1, "EPILOGUE": 36 if biased else 32, "FAST_ACCUM": 1} | ({"BIAS_TYPE": 14} if biased else {})
    pointers = {place: scale.data_ptr() for place, scale in scales.items()}
    pointers |= {POINTERS["BIAS_POINTER"]: bias.data_ptr()} if biased else {}
    asked = {place: int.from_bytes(value, "little") for place, value in library.attributes.items()}
    assert asked == {WORDS[name]: word for name, word in words.items()} | pointers
    e4m3, bf16 = 28, 14
    assert library.layouts == [(e4m3, 32, 48, 32), (e4m3, 32, 5, 32), (bf16, 48, 5, 64), (e4m3, 48, 5, 64)]
    operands = [codes.data_ptr(), x.data_ptr(), out.data_ptr()]
    assert [pointer for pointer in library.product if pointer in operands] == operands


def test_what_is_made_is_destroyed(ask: Any) -> None:
    library = ask()[0]
    for kind in ("MatmulDesc", "MatrixLayout", "MatmulPreference"):
        assert library.calls[f"cublasLt{kind}Create"] == library.calls[f"cublasLt{kind}Destroy"] > 0


@pytest.mark.parametrize(
    ("fails", "said"),
    [
        ("cublasLtMatmul", "cublasLtMatmul answers: status 15"),
        ("found", "has no product of FP8 with GELU of these shapes"),
    ],
)
def test_a_refusal_is_passed_on(ask: Any, fails: str, said: str) -> None:
    with pytest.raises(Unsupported, match=said):
        ask(fails)
