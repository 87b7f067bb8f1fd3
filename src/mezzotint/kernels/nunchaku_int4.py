"""SVDQuant INT4 on the GPUs whose tensor cores know 4-bit integers, by Nunchaku."""

from mezzotint.kernels.nunchaku import Nunchaku
from mezzotint.schemes import SVDQUANT_INT4
from mezzotint.tensor import Layout

BACKEND = Nunchaku(
    name="nunchaku_int4",
    scheme=SVDQUANT_INT4,
    gpus=((8, 0), (8, 6), (8, 9)),  # and sm_75, which multiplies in FP16 only
    inputs="INT4",
    wants=Layout("fragments", "fragments", "fragments", "fragments"),
)
