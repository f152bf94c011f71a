"""What a storage form is: it offers rate-distortion curves of a matrix while that is in memory, and encodes itself when it is chosen."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

from torch import Tensor

from ...allocation.curves import Curve
from ...allocation.spectra import MatrixSpectra
from ...deltas.precision import Precision
from ...deltas.sink import EncodedTensor
from ...lowrank.factors import Matrix
from ...lowrank.row_blocks import Difference
from ...task_vectors.tensor import ChangedTensor
from ..basis_store import KeptBases
from ..context import MergeContext
from ..rank_bounds import RankBounds
from ..spectra import Decomposed


class Form(Protocol):
    """One way to store a matrix of all tasks; add one in a file of its own and a line of ``forms.FORMS``."""

    name: str

    def choices(self, look: "Look") -> Iterable["Choice"]:
        """Choices that the form offers for the matrix that is looked at; none where it is no use to try."""

    def encode(self, context: MergeContext, decision: "Decision") -> EncodedTensor:
        """The matrix as it was decided."""

    def ranks(self, decision: "Decision", tasks: int) -> list[int]:
        """Rank of what is stored, of the shared part and of each expert."""


@dataclass(frozen=True)
class Choice:
    """One form of one matrix in one precision.

    Args:
        curve: weighted error against bits; a ``PlacedCurve`` where ``spectra`` is None.
        bases: that it stands on; let go of with the choice.
        spectra: of modules whose ranks are allocated once the choice is made.
    """

    form: Form
    precision: Precision
    curve: Curve
    bases: KeptBases | None = None
    spectra: MatrixSpectra | None = None


@dataclass(frozen=True)
class Decision:
    """How one matrix is stored: all that its encoding needs.

    Args:
        point: ranks (T + 1,) of the modules of ``spectra``, or the operating point on the curve of the choice.
    """

    name: str
    form: Form
    precision: Precision
    point: Any
    bases: KeptBases | None
    spectra: MatrixSpectra | None = None


@dataclass(frozen=True)
class FirstGuess:
    """A guess of the merge's multiplier and error before anything is decomposed for all tasks.

    Args:
        multiplier: error per bit at which dense matrices, codes of piloted spectra, or nothing meet the budget.
        relative_error: part of the weighted energy that dense matrices in fixed widths lose.
    """

    multiplier: float
    relative_error: float


@dataclass(frozen=True)
class Sample:
    """Spectrum and likeness of one matrix's task vectors, estimated from a sample.

    Args:
        sigma: (T, q) singular values, tail: (T,) energy beyond: of the best that low rank may keep, or if piloted of one
            task vector, scaled to the energies of the others.
        alike: energy of the mean over that of the mean of unrelated tasks, 1 to T.
        piloted: which of the two.
    """

    sigma: Tensor
    tail: Tensor
    alike: float
    piloted: bool = False


@dataclass(frozen=True)
class Observed:
    """Findings about a tensor from the pass that takes its energies.

    Args:
        beyond: per precision, what rounding dense experts loses of their energy beyond what is expected; none if not known.
    """

    sample: Sample | None
    beyond: tuple[float, ...] = ()


class Look:
    """One matrix while it is looked at: read at most once, and not before a form asks.

    Args:
        sample: None where none was taken.

    Attributes:
        experts: spectra of experts without anything shared, known before other forms are asked.
    """

    experts: Decomposed

    def __init__(
        self,
        context: MergeContext,
        bounds: RankBounds,
        name: str,
        guess: FirstGuess,
        sample: Sample | None = None,
    ):
        self.context, self.bounds, self.name = context, bounds, name
        self.guess, self.sample = guess, sample

    @cached_property
    def tensor(self) -> ChangedTensor:
        return self.context.tensor(self.name)

    @cached_property
    def matrices(self) -> Sequence[Matrix]:
        """T task vectors (m, n) in float32, those of adapters as factors."""
        return self.tensor.matrices()

    @cached_property
    def differences(self) -> Sequence[Difference]:
        """T task vectors that are not formed."""
        return self.tensor.differences()

    @property
    def energy(self) -> Tensor:
        """Squared norms of the task vectors, (T,)."""
        return self.context.energy[self.name]

    @property
    def weights(self) -> Tensor:
        """(T,) of the squared errors."""
        return self.context.weights[self.name]

    @property
    def sides(self) -> tuple[int, int]:
        return self.context.sides(self.name)

    @property
    def dense(self) -> bool:
        """Whether experts, but for those of adapters, are known to be stored dense or not at all."""
        sigma, tail = self.experts.spectra.of_experts
        return not sigma.shape[1] or bool(((tail > 0) & ~sigma.any(1)).any())
