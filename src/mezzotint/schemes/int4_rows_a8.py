"""INT4 weights with one scale per row, and INT8 inputs: ConvRot's W4A4 files, run as W4A8."""

from mezzotint.schemes.int4_rows import PARTS, decode_int4_rows
from mezzotint.schemes.int8 import INT8_MAX, quantize_activation_int8
from mezzotint.schemes.scheme import COMMON_PARTS, INPUT_SCALE, ROTATION, Scheme

SCHEME = Scheme(
    name="int4_rows_a8",
    title="INT4 by row, INT8 inputs",
    bits=4,
    usual_error=0.3,
    keeps_bias=True,
    parts=PARTS,
    optional={"input_scale": INPUT_SCALE, "rotation": ROTATION} | COMMON_PARTS,
    decode=decode_int4_rows,
    input_max=INT8_MAX,
    quantize_activation=quantize_activation_int8,
    static_scale_part="input_scale",
)
