"""SVDQuant INT4 by Nunchaku, on GPUs with INT4 tensor cores."""

from mezzotint.kernels.nunchaku import Nunchaku
from mezzotint.schemes import SVDQUANT_INT4
from mezzotint.tensor import Layout

BACKEND = Nunchaku(
    name="nunchaku_int4",
    scheme=SVDQUANT_INT4,
    gpus=((8, 0), (8, 6), (8, 9)),  # sm_75 is left out, because it computes in FP16 only
    activation_format="INT4",
    weight_layout=Layout("fragments", "fragments", "fragments", "fragments"),
)
