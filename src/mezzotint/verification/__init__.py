"""Verification of a checkpoint: files, headers, values and, with a base, weight errors."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from mezzotint.builtin import component_folder, matching_component, resolve
from mezzotint.checkpoint import Checkpoint
from mezzotint.conversion.planning import DECODED
from mezzotint.errors import CheckpointError, Unsupported, join_names
from mezzotint.formats.companion_files import hf_folder, open_header
from mezzotint.formats.contents import unclaimed_parts
from mezzotint.formats.renaming import Renames
from mezzotint.hub import AnyPath, local_copy
from mezzotint.loading.plan import plan
from mezzotint.verification import against_base
from mezzotint.verification.against_base import LayerError
from mezzotint.verification.files import (
    Files,
    check_checksum,
    missing_recorded_files,
    read_files,
    recorded_checksums,
)
from mezzotint.verification.findings import (
    VERDICTS,
    Finding,
    Progress,
    Severity,
    broken,
    finding_from_error,
    suspicious,
    worst_first,
)
from mezzotint.verification.outliers import compare_layers
from mezzotint.verification.repair import Repair, repair_files
from mezzotint.verification.values import (
    LayerStatistics,
    check_linear,
    check_plain,
    check_smoothing,
)

__all__ = ["Finding", "LayerError", "Repair", "Severity", "VerifyReport", "verify"]


@dataclass(frozen=True)
class VerifyReport:
    """The findings of a verification. `layers` is empty without a base to compare with."""

    path: Path
    format: str
    files: tuple[str, ...]
    tensors: int
    nbytes: int
    checksums: int
    findings: tuple[Finding, ...]
    layers: tuple[LayerError, ...] = ()
    repairs: tuple[Repair, ...] = ()

    @property
    def severity(self) -> Severity:
        """Return the severity of the worst finding."""
        return max((finding.severity for finding in self.findings), default=Severity.NOTE)

    @property
    def exit_code(self) -> int:
        """Return 0 for sound, 1 for suspicious, 2 for broken, 3 for an unsupported format."""
        return int(self.severity)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON: the worst findings, and the number of the others."""
        printed = worst_first(self.findings)
        findings = [
            asdict(finding)
            | {
                "severity": finding.severity.name.lower(),
                "file": finding.file and str(finding.file),
            }
            for finding in printed
        ]
        return asdict(replace(self, findings=())) | {
            "path": str(self.path),
            "verdict": VERDICTS[self.exit_code],
            "findings": findings,
            "more_findings": len(self.findings) - len(printed),
        }


def verify(
    path: str | Path,
    base: str | Path | None = None,
    *,
    component: str | None = None,
    scales_from: str | Path | None = None,
    repair: bool = False,
    rename: Renames | None = None,
    on_progress: Progress | None = None,
) -> VerifyReport:
    """Check a checkpoint file or component folder. Faults are reported as findings, not raised.

    base          unquantized component of the same model, to compare every layer with
    component     folder inside `path`, if `path` is a pipeline ["transformer"]
    scales_from   checkpoint to take missing static input scales from
    rename        {regular expression: replacement} for tensor names
    repair        first download broken and missing files again, if they came from the Hub
    Raises        CheckpointError if `base` or `scales_from` cannot be read
    """
    location = local_copy(component_folder(resolve(path), component))
    folder = local_copy(hf_folder(location))
    repairs: tuple[Repair, ...] = ()
    files = read_files(folder)
    if repair:
        repairs = tuple(repair_files(_files_to_fetch(files)))
        files = read_files(folder)
    reference = (
        None if base is None else Checkpoint.open(matching_component(resolve(base), component))
    )
    scales = None if scales_from is None else matching_component(resolve(scales_from), component)
    return _Verification(location, files, reference, scales, on_progress, rename).report(repairs)


def _files_to_fetch(files: Files) -> Iterator[Path]:
    """Yield files that are missing or damaged."""
    for finding in (*files.findings, *missing_recorded_files(files)):
        if finding.file is not None:
            yield finding.file
    for file, sha256 in recorded_checksums(files).items():
        yield from (file for _ in check_checksum(file, sha256))


class _Verification:
    """One verification in progress. It collects findings and counts bytes."""

    def __init__(
        self,
        path: Path,
        files: Files,
        base: Checkpoint | None,
        scales_from: AnyPath | None,
        on_progress: Progress | None,
        rename: Renames | None = None,
    ) -> None:
        self.rename = rename
        self.path, self.files, self.base, self.scales_from = path, files, base, scales_from
        self.on_progress = on_progress
        self.checksums = recorded_checksums(files)
        stored_bytes = sum(header.nbytes() for header in files.headers.values())
        hashed_bytes = sum(file.stat().st_size for file in self.checksums)
        # With a base, the tensors are read twice: for their values, and for the comparison.
        self.total = hashed_bytes + stored_bytes * (1 if base is None else 2)
        self.done = 0

    def report(self, repairs: Sequence[Repair]) -> VerifyReport:
        findings = [*self.files.findings, *missing_recorded_files(self.files), *self._checksums()]
        checkpoint = self._open(findings)
        errors: list[LayerError] = []
        if checkpoint is not None:
            checkpoint = checkpoint if self.base is None else checkpoint.trim_padding_to(self.base)
            findings += self._check_contents(checkpoint)
            if self.base is not None:
                checkpoint = self._detect_layout(checkpoint, self.base, findings)
                errors = self._compare(checkpoint, self.base, findings)
        headers = self.files.headers
        return VerifyReport(
            path=self.path,
            format=checkpoint.detected.format.title if checkpoint is not None else "not recognized",
            files=tuple(file.name for file in headers),
            tensors=sum(len(header.tensors) for header in headers.values()),
            nbytes=sum(header.nbytes() for header in headers.values()),
            checksums=len(self.checksums),
            findings=tuple(findings),
            layers=tuple(errors),
            repairs=tuple(repairs),
        )

    def _check_contents(self, checkpoint: Checkpoint) -> Iterator[Finding]:
        values = [*self._values(checkpoint)]
        yield from values
        for name in checkpoint.unknown_tensors:
            yield suspicious("unknown", name, f"is not part of a {checkpoint.family.title} model")
        # A malformed layer would be reported a second time as a mismatch with the configuration.
        if not any(finding.check == "layers" for finding in values):
            yield from _against_config(checkpoint)
        for message in checkpoint.contradictions:
            yield suspicious("config", str(self.path), message)

    def _count(self, size: int) -> None:
        self.done += size
        if self.on_progress is not None:
            self.on_progress(self.done, self.total)

    def _checksums(self) -> Iterator[Finding]:
        for file, sha256 in self.checksums.items():
            yield from check_checksum(file, sha256)
            self._count(file.stat().st_size)

    def _open(self, findings: list[Finding]) -> Checkpoint | None:
        """Open the checkpoint. Add a finding and return None if that fails."""
        try:
            checkpoint = Checkpoint.of(open_header(self.path, self.scales_from, self.rename))
            _ = checkpoint.linears
        except (CheckpointError, Unsupported) as error:
            # If a file is broken, that is the cause, and it is already among the findings.
            if not any(finding.severity >= Severity.BROKEN for finding in findings):
                findings.append(finding_from_error("format", str(self.path), error))
            return None
        return checkpoint

    def _values(self, checkpoint: Checkpoint) -> Iterator[Finding]:
        header, ignored = checkpoint.header, checkpoint.ignored
        sound_layers: dict[str, LayerStatistics] = {}
        for module, linear in checkpoint.contents.linears.items():
            if ignored.keys() >= {*linear.keys.values()}:
                continue
            statistics, layer_findings = check_linear(module, linear, header)
            yield from layer_findings
            if statistics is not None and not layer_findings:
                sound_layers[module] = statistics
            self._count(linear.nbytes(header))
        yield from check_smoothing(checkpoint.contents.linears)
        yield from compare_layers(sound_layers)
        for key, fault in unclaimed_parts(header, checkpoint.contents).items():
            yield broken(
                "unclaimed", key, fault, "its weight is missing, or belongs to another export."
            )
        for key in checkpoint.contents.plain:
            if key not in ignored:
                packed = checkpoint.contents.packed.get(key)
                yield from check_plain(key, header.tensors[key], packed)
            self._count(header.tensors[key].nbytes)

    def _detect_layout(
        self, checkpoint: Checkpoint, base: Checkpoint, findings: list[Finding]
    ) -> Checkpoint:
        """Return the checkpoint with the layout that a comparison with the base shows."""
        try:
            detected = checkpoint.detect_from_base(base)
        except CheckpointError:
            # This hides nothing: damaged layers are already findings, `_compare` checks the rest.
            return checkpoint
        if detected.contents.linears != checkpoint.contents.linears:
            evidence = "; ".join(detected.contents.evidence)
            hint = (
                "a reader that follows the format gives noise; "
                "`mezzotint convert --base` corrects the layout."
            )
            findings.append(broken("layout", str(self.path), evidence, hint))
        return detected

    def _compare(
        self, checkpoint: Checkpoint, base: Checkpoint, findings: list[Finding]
    ) -> list[LayerError]:
        damaged = {finding.where for finding in findings if finding.severity == Severity.BROKEN}
        compared: dict[str, LayerError | None] = {}
        for module, pieces in checkpoint.linears.items():
            if not any(piece.source in damaged for piece in pieces):
                compared[module] = against_base.compare_layer(checkpoint, module, base)
            linears = [checkpoint.stored_linear(piece.source) for piece in pieces]
            self._count(sum(linear.nbytes(checkpoint.header) for linear in linears))
        for name, piece in checkpoint.plain.items():
            compared[name] = against_base.compare_plain(checkpoint, name, base)
            self._count(checkpoint.header.tensors[piece.source].nbytes)
        errors = [error for error in compared.values() if error is not None]
        unmatched = [name for name, error in compared.items() if error is None]
        findings += against_base.find_outliers(errors, DECODED in self.files.transforms)
        if unmatched:
            message = f"has no tensor of the same shape for {join_names(unmatched)}"
            findings.append(suspicious("base", str(base.header.path), message))
        return errors


def _against_config(checkpoint: Checkpoint) -> Iterator[Finding]:
    """Check that the tensors are exactly the tensors of the model that config.json describes."""
    config = checkpoint.header.config
    if "_class_name" not in config:
        yield Finding(
            Severity.NOTE,
            "config",
            str(checkpoint.header.path),
            "there is no config.json to compare it with",
        )
    elif config["_class_name"] != checkpoint.family.transformer_class:
        title = checkpoint.family.title
        message = f"names {config['_class_name']}, and the tensors belong to {title}"
        yield suspicious("config", "config.json", message)
        return
    try:
        plan(checkpoint.without_input_scales(), checkpoint.model())
    except CheckpointError as error:
        where = "config.json" if config else str(checkpoint.header.path)
        yield finding_from_error("config", where, error)
