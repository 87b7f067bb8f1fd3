"""Say whether a checkpoint is sound: its files, its headers, its numbers, and, with a base, its weights."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from mezzotint.builtin import component_folder, counterpart, resolve
from mezzotint.checkpoint import Checkpoint
from mezzotint.errors import CheckpointError, Unsupported, listed
from mezzotint.formats.contents import orphans
from mezzotint.formats.renaming import Renames
from mezzotint.formats.supplement import hf_folder, open_header
from mezzotint.hub import AnyPath, local_copy
from mezzotint.loading import plan
from mezzotint.verifying import against_base
from mezzotint.verifying.against_base import LayerError
from mezzotint.verifying.files import Files, check_sum, look_at_files, recorded_but_absent, recorded_checksums
from mezzotint.verifying.findings import (
    VERDICTS,
    Finding,
    Progress,
    Severity,
    broken,
    of_error,
    suspicious,
    worst_first,
)
from mezzotint.verifying.repair import Repair, fetch_again
from mezzotint.verifying.sisters import compare_sisters
from mezzotint.verifying.values import LayerLook, check_linear, check_plain, check_smoothing

__all__ = ["Finding", "LayerError", "Repair", "Severity", "VerifyReport", "verify"]


@dataclass(frozen=True)
class VerifyReport:
    """What was checked and what was found; `layers` is filled where there was a base to compare with."""

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
        return max((finding.severity for finding in self.findings), default=Severity.NOTE)

    @property
    def exit_code(self) -> int:
        """0 sound, 1 suspicious, 2 broken, 3 not a format that is read."""
        return int(self.severity)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON has it: the worst findings, and how many more there are."""
        printed = worst_first(self.findings)
        findings = [
            asdict(finding) | {"severity": finding.severity.name.lower(), "file": finding.file and str(finding.file)}
            for finding in printed
        ]
        more = {"findings": findings, "more_findings": len(self.findings) - len(printed)}
        facts = asdict(replace(self, findings=()))
        return facts | {"path": str(self.path), "verdict": VERDICTS[self.exit_code], **more}


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
    """Check a checkpoint file or component folder; nothing is raised for what is wrong with it, only reported.

    base          unquantized component of the same model, to compare every layer with
    component     folder inside `path`, where that is a whole pipeline ["transformer"]
    scales_from   checkpoint whose static input scales fill in for those that `path` lacks
    rename        {regular expression: replacement} for a checkpoint that differs in its tensors' names alone
    repair        download broken and missing files again from the Hub first, where they came from there
    Raises        CheckpointError only for a base or scales that cannot be read
    """
    place = local_copy(component_folder(resolve(path), component))
    folder = local_copy(hf_folder(place))
    repairs: tuple[Repair, ...] = ()
    files = look_at_files(folder)
    if repair:
        repairs = tuple(fetch_again(_to_fetch(files)))
        files = look_at_files(folder)
    reference = None if base is None else Checkpoint.open(counterpart(resolve(base), component))
    sister = None if scales_from is None else counterpart(resolve(scales_from), component)
    return _Run(place, files, reference, sister, on_progress, rename).report(repairs)


def _to_fetch(files: Files) -> Iterator[Path]:
    """Files that are missing or not what they were when they were written."""
    for finding in (*files.findings, *recorded_but_absent(files)):
        if finding.file is not None:
            yield finding.file
    for file, sha256 in recorded_checksums(files).items():
        yield from (file for _ in check_sum(file, sha256))


class _Run:
    """One verification; collects findings and counts bytes."""

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
        self.sums = recorded_checksums(files)
        stored = sum(header.nbytes() for header in files.headers.values())
        self.total = sum(file.stat().st_size for file in self.sums) + stored * (1 if base is None else 2)
        self.done = 0

    def report(self, repairs: Sequence[Repair]) -> VerifyReport:
        findings = [*self.files.findings, *recorded_but_absent(self.files), *self._checksums()]
        checkpoint = self._open(findings)
        errors: list[LayerError] = []
        if checkpoint is not None:
            checkpoint = checkpoint if self.base is None else checkpoint.fitted_to(self.base)
            findings += self._values(checkpoint)
            findings += [
                suspicious("unknown", name, f"has no place in a {checkpoint.family.title} model")
                for name in checkpoint.unplaced
            ]
            if not any(finding.check == "layers" for finding in findings):
                findings += _against_config(checkpoint)
            findings += [suspicious("config", str(self.path), said) for said in checkpoint.contradictions]
            if self.base is not None:
                checkpoint = self._measured(checkpoint, self.base, findings)
                errors = self._compare(checkpoint, self.base, findings)
        return VerifyReport(
            path=self.path,
            format=checkpoint.recognised.format.title if checkpoint is not None else "not recognised",
            files=tuple(file.name for file in self.files.headers),
            tensors=sum(len(header.tensors) for header in self.files.headers.values()),
            nbytes=sum(header.nbytes() for header in self.files.headers.values()),
            checksums=len(self.sums),
            findings=tuple(findings),
            layers=tuple(errors),
            repairs=tuple(repairs),
        )

    def _count(self, size: int) -> None:
        self.done += size
        if self.on_progress is not None:
            self.on_progress(self.done, self.total)

    def _checksums(self) -> Iterator[Finding]:
        for file, sha256 in self.sums.items():
            yield from check_sum(file, sha256)
            self._count(file.stat().st_size)

    def _open(self, findings: list[Finding]) -> Checkpoint | None:
        """The checkpoint, or None if the files cannot be read as one; what stops it is among the findings."""
        try:
            checkpoint = Checkpoint.of(open_header(self.path, self.scales_from, self.rename))
            _ = checkpoint.linears
        except (CheckpointError, Unsupported) as error:
            if not any(finding.severity >= Severity.BROKEN for finding in findings):
                findings.append(of_error("format", str(self.path), error))
            return None
        return checkpoint

    def _values(self, checkpoint: Checkpoint) -> Iterator[Finding]:
        header, ignored = checkpoint.header, checkpoint.ignored
        looks: dict[str, LayerLook] = {}
        for module, linear in checkpoint.contents.linears.items():
            if ignored.keys() >= {*linear.keys.values()}:
                continue
            seen, found = check_linear(module, linear, header)
            yield from found
            looks |= {module: seen} if seen is not None and not found else {}
            self._count(linear.nbytes(header))
        yield from check_smoothing(checkpoint.contents.linears)
        yield from compare_sisters(looks)
        for key, fault in orphans(header, checkpoint.contents).items():
            yield broken("unclaimed", key, fault, "its weight is lost, or from another export.")
        for key in checkpoint.contents.plain:
            if key not in ignored:
                yield from check_plain(key, header.tensors[key])
            self._count(header.tensors[key].nbytes)

    def _measured(self, checkpoint: Checkpoint, base: Checkpoint, findings: list[Finding]) -> Checkpoint:
        """The checkpoint with the layout that its numbers show beside the base, if they show one for all of it."""
        try:
            measured = checkpoint.measured(base)
        except CheckpointError:  # its layers are compared one by one, and those that are damaged have been found
            return checkpoint
        if measured.contents.linears != checkpoint.contents.linears:
            hint = "readers that go by the format paint noise; `mezzotint convert --base` puts the bytes right."
            findings.append(broken("layout", str(self.path), "; ".join(measured.contents.evidence), hint))
        return measured

    def _compare(self, checkpoint: Checkpoint, base: Checkpoint, findings: list[Finding]) -> list[LayerError]:
        damaged = {finding.where for finding in findings if finding.severity == Severity.BROKEN}
        found: dict[str, LayerError | None] = {}
        for module, pieces in checkpoint.linears.items():
            if not any(piece.source in damaged for piece in pieces):
                found[module] = against_base.compare_layer(checkpoint, module, base)
            self._count(sum(checkpoint.stored(piece.source).nbytes(checkpoint.header) for piece in pieces))
        for name, piece in checkpoint.plain.items():
            found[name] = against_base.compare_plain(checkpoint, name, base)
            self._count(checkpoint.header.tensors[piece.source].nbytes)
        errors = [error for error in found.values() if error is not None]
        lacking = [name for name, error in found.items() if error is None]
        findings += against_base.judge(errors, "decoded to BF16" in self.files.transforms)
        if lacking:
            message = f"has no counterpart of its shape for {listed(lacking)}"
            findings.append(suspicious("base", str(base.header.path), message))
        return errors


def _against_config(checkpoint: Checkpoint) -> Iterator[Finding]:
    """The model that config.json describes has a place for every tensor, and a tensor for every place."""
    config = checkpoint.header.config
    if "_class_name" not in config:
        yield Finding(
            Severity.NOTE, "config", str(checkpoint.header.path), "no config.json beside it to hold it against"
        )
    elif config["_class_name"] != checkpoint.family.transformer:
        message = f"names {config['_class_name']}, and the tensors are those of {checkpoint.family.title}"
        yield suspicious("config", "config.json", message)
        return
    try:
        plan(checkpoint.without_input_scales(), checkpoint.model())
    except CheckpointError as error:
        yield of_error("config", "config.json" if config else str(checkpoint.header.path), error)
