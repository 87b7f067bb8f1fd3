"""`compare` fails every planted fault at its profile, and passes what they were planted into."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mezzotint.quality.compare import compare
from support.checkpoint_edits import WEIGHTS
from support.planted_faults import FAULTS, SMOOTH, Fault, plant, sound

SOUND = ("demo-fp8", "demo-nvfp4", "demo-nvfp4-comfy")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_every_fault_fails_and_every_sound_copy_passes(tmp_path: Path) -> None:
    """The whole set of 24 prompts; 3 min on two cores."""
    faulty = {fault.name: plant(fault, tmp_path / fault.name) for fault in FAULTS}
    fine = {name: name for name in SOUND} | {SMOOTH: str(sound(SMOOTH, tmp_path / SMOOTH))}
    sources = [f"{name}={source}" for name, source in (fine | faulty).items()]
    comparison = compare("demo", sources, tmp_path / "report", device="cpu")
    for candidate in comparison.candidates:
        print(
            f"{candidate.name} ({candidate.gate.name}): {candidate.verdict}; "
            f"{'; '.join(candidate.reasons)}; "
            + ", ".join(
                f"{name} {candidate.drift[name]:.2f}"
                for name in ("latent_rmse_last", "psnr", "ssim")
            )
        )
    assert {candidate.name: candidate.verdict for candidate in comparison.candidates} == {
        **dict.fromkeys(fine, "pass"),
        **dict.fromkeys(faulty, "fail"),
    }


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


@pytest.mark.parametrize(
    "fault", [fault for fault in FAULTS if fault.base in SOUND], ids=lambda fault: fault.name
)
def test_a_fault_is_where_it_says(tmp_path: Path, fault: Fault) -> None:
    before = load_file(sound(fault.base, tmp_path / "sound") / WEIGHTS)
    after = load_file(plant(fault, tmp_path / "faulty") / WEIGHTS)
    changed = [name for name in before if not same(before[name], after[name])]
    assert changed
    assert all(name.startswith(f"{fault.module}.") for name in changed)
