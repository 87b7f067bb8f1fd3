"""SVDQuant NVFP4 on GeForce Blackwell, by Nunchaku."""

from mezzotint.kernels.nunchaku import Nunchaku
from mezzotint.schemes import SVDQUANT_NVFP4
from mezzotint.tensor import Layout

BACKEND = Nunchaku(
    name="nunchaku_nvfp4",
    scheme=SVDQUANT_NVFP4,
    gpus=((12, 0), (12, 1)),
    inputs="NVFP4",
    wants=Layout("fragments", "micro_fragments", "fragments", "fragments"),
)
