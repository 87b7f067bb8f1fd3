"""SVDQuant NVFP4 by Nunchaku, on GeForce Blackwell."""

from mezzotint.kernels.nunchaku import Nunchaku
from mezzotint.schemes import SVDQUANT_NVFP4
from mezzotint.tensor import Layout

BACKEND = Nunchaku(
    name="nunchaku_nvfp4",
    scheme=SVDQUANT_NVFP4,
    gpus=((12, 0), (12, 1)),
    activation_format="NVFP4",
    weight_layout=Layout("fragments", "micro_fragments", "fragments", "fragments"),
)
