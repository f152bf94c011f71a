"""What a merge found in earlier runs: energies, samples, curves and bases, by stage and tensor, in the journal beside its output."""

import threading
from collections import Counter
from pathlib import Path
from typing import Any

from ..allocation.coded_curve import CodedCurve
from ..allocation.curves import PerTaskCurve
from ..allocation.spectra import MatrixSpectra, Rate
from ..allocation.tucker_curve import TuckerCurve
from ..checkpoint.journal import ENCODED, Journal
from ..checkpoint.records import Records
from ..deltas.precision import Precision
from ..files import file_digest, is_regular
from ..lowrank.decomposition import Coupling
from .basis_store import BasisStore, KeptBases
from .forms import EXPERTS, FORMS, Choice, Form
from .forms.base import Observed, Sample
from .spectra import Decomposed

_CLASSES = (
    Choice,
    Coupling,
    Decomposed,
    MatrixSpectra,
    CodedCurve,
    Observed,
    PerTaskCurve,
    Precision,
    Rate,
    Sample,
    TuckerCurve,
)


class Finished:
    """A :class:`~fusion_bench_didi.distributed.ownership.Memory` of a journal, whose bases a store keeps."""

    def __init__(self, journal: Journal, store: BasisStore | None = None):
        self._journal, self._store = journal, store
        self._rounds: Counter[str] = Counter()
        self._here = threading.local()
        named = {type(form): _Named() for form in (EXPERTS, *FORMS)}
        self._records = Records(_CLASSES, {**named, KeptBases: self})

    def stage(self, name: str) -> str:
        self._rounds[name] += 1
        return f"{name} {self._rounds[name]}"

    def recall(self, stage: str, name: str) -> Any:
        line = self._journal.find(stage, name)
        if line is None or not self._standing(line.facts.get("bases", ()), name):
            self._journal.begin(stage, name)
            return None
        content = line.content or line.file.read_bytes()
        (found,) = self._records.unpacked(content)
        return found

    def record(self, stage: str, name: str, found: Any) -> None:
        self._here.files = []
        content = self._records.packed((found,))
        files = self._here.files
        if files:
            self._store.lay(name, files)
        facts = {"bases": [[file.name, file_digest(file)] for file in files]}
        self._journal.done(stage, name, content=content, facts=facts)

    def _standing(self, bases: list[tuple[str, str]], name: str) -> bool:
        """Whether the bases that a finding stands on are as they were written, or not needed any more."""
        if not bases or self._journal.find(ENCODED, name):
            return True
        files = [(self._journal.path / Path(base).name, told) for base, told in bases]
        if not all(
            is_regular(file) and file_digest(file) == told for file, told in files
        ):
            return False
        self._store.lay(name, [file for file, _ in files])
        return True

    def plain(self, kept: KeptBases) -> str:
        file = self._store.lasting(kept)
        self._here.files.append(file)
        return file.name

    def made(self, name: str) -> KeptBases:
        return KeptBases(None, self._journal.path / Path(name).name)


class _Named:
    """Forms are what they are called."""

    def plain(self, form: Form) -> str:
        return form.name

    def made(self, name: str) -> Form:
        return next(form for form in (EXPERTS, *FORMS) if form.name == name)
