"""Entropy-coded experts: all entries or leading directions as whole numbers, each direction with as many bits as it deserves.

A direction of a large singular value gets fine numbers, one at the margin coarse ones, all by one step per expert: no fixed
width and no rank has to be chosen (reverse water-filling). What the codes take is known from spectra to about a percent; the
step is then moved until they fit.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from ...allocation.coded_curve import OVERHEAD, CodedCurve, CodedPoint
from ...deltas.base import Delta
from ...deltas.coded import CodedDelta, CodedLowRankDelta
from ...deltas.precision import Precision
from ...deltas.sink import EncodedTensor
from ...lowrank.factored import as_dense
from ...lowrank.factors import Matrix, energy_of
from ...lowrank.svd import HalfSVD
from ...quantization.coded_matrix import code_product, code_rows
from ..context import MergeContext
from ..spectra import Decomposed
from .base import Choice, Decision, Look

#: As reports call it.
CODED_PRECISION = Precision("coded", 0)
#: Where dense matrices lose less than this at the budget, codes gain nothing that a task would show; but of uneven ones.
WORTH_CODING = 0.01


class Coded:
    """Coded experts without a shared part."""

    name = "coded"

    def choices(self, look: Look) -> Iterator[Choice]:
        context, gain = look.context, look.guess.relative_error >= WORTH_CODING
        uneven = any(context.beyond.get(look.name, ()))
        if context.settings.factor_dtype != "auto" or not (gain or uneven):
            return
        yield self.choice(context, look.name, look.experts)

    def choice(self, context: MergeContext, name: str, known: Decomposed) -> Choice:
        """The coded form of experts of known spectra, or of none."""
        curve = coded_curve(context, name, known.spectra.sigma[1:])
        return Choice(self, CODED_PRECISION, curve, known.bases)

    def encode(self, context: MergeContext, decision: Decision) -> EncodedTensor:
        tensor, point = context.tensor(decision.name), decision.point
        bases = decision.bases.take()[1:] if decision.bases else ()
        made = [
            _encode(context, tau, point, t, bases[t] if bases else None, tensor.shape)
            for t, tau in enumerate(tensor.matrices())
        ]
        experts, errors = zip(*made)
        return EncodedTensor(decision.name, None, experts, torch.stack(errors))

    def ranks(self, decision: Decision, tasks: int) -> list[int]:
        return [0, *decision.point.ranks]


def coded_curve(context: MergeContext, name: str, sigma: Tensor) -> CodedCurve:
    """The rate-distortion curve of a matrix's coded experts of known singular values (T, q)."""
    tensor, most = context.tensor(name), context.inventory.most(name)
    return CodedCurve(
        context.sides(name),
        sigma[:, :most],
        context.energy[name],
        context.weights[name],
        whole=most is None and not (tensor.factored or tensor.large),
        quantizer=context.settings.quantizer,
    )


def _encode(
    context: MergeContext,
    tau: Matrix,
    point: CodedPoint,
    t: int,
    basis: HalfSVD | None,
    shape: tuple[int, ...],
) -> tuple[Delta | None, Tensor]:
    """The expert of one task vector (m, n), and its squared error."""
    bits, step, rank = point.bits[t], point.steps[t], point.ranks[t]
    if not rank:
        return None, energy_of(tau).double().cpu()
    bits -= OVERHEAD
    how = {
        "quantizer": context.settings.quantizer,
        "restored": context.settings.gain == "auto",
    }
    if point.whole[t]:
        coded = code_rows(as_dense(tau), step, bits, **how)
        delta: Delta = CodedDelta.of(shape, coded)
    else:
        vectors, values = (
            x[..., :rank].to(tau.device) for x in (basis.vectors, basis.S)
        )
        coded = code_product(tau, vectors, values, step, bits, **how)
        delta = CodedLowRankDelta.of(shape, coded)
    if not bool(coded.sides[-1].any().any()):
        return None, energy_of(tau).double().cpu()
    return delta, torch.tensor(coded.error, dtype=torch.float64)


CODED = Coded()
