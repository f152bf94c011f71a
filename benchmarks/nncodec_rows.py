"""Task vectors through NNCodec, the coder of ISO/IEC 15938-17: trellis-coded quantization and arithmetic coding.

It is a rival to measure against and no part of the package; ``pip install -e '.[figures]'`` where it is wanted.
"""

import contextlib
import io
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fusion_bench_didi.pools.opening import load_backbone

#: Logarithm of the number of steps that the coder has between two powers of two.
_DENSITY = 2
#: How many of them finer vectors are coded than matrices: a quarter of the step.
_VECTORS_FINER = 8


#: Of rate against squared error in its trellis; of 0, 0.04, 0.1, 0.3 and 1 the best at low rates on real8's task vectors.
_RATE = 1.0


def encoded(task_vector: Mapping[str, np.ndarray], step: float) -> bytes:
    """A task vector as a bit stream.

    Args:
        step: of the quantizer, in standard deviations of each tensor, which keeps more on real8's validation images than one
            step for all; vectors have a quarter of it.
    """
    from nncodec import nnc
    from nncodec.nnc_core.common import get_qp_from_stepsize

    parameters = {}
    for name, value in task_vector.items():
        deviation = float(value.std()) or float(abs(value).max())
        found = round(get_qp_from_stepsize(step * deviation, _DENSITY))
        parameters[name] = found - (_VECTORS_FINER if value.ndim < 2 else 0)
    with contextlib.redirect_stdout(io.StringIO()):
        stream = nnc.compress(
            dict(task_vector),
            bitstream_path=None,
            qp_per_tensor=parameters,
            qp_density=_DENSITY,
            use_dq=True,
            lambda_scale=_RATE,
            param_opt=True,
            return_bitstream=True,
            verbose=False,
        )
    return bytes(stream)


def decoded(stream: bytes) -> dict[str, np.ndarray]:
    from nncodec import nnc

    with contextlib.redirect_stdout(io.StringIO()):
        return nnc.decompress(bytearray(stream), verbose=False)


class Coded:
    """What NNCodec keeps of every fine-tuned model of a pool.

    Args:
        modelpool: the host's pool.
        step: as for :func:`encoded`.
        gain: of what is decoded; it costs nothing to speak of.
    """

    def __init__(self, modelpool: Any, *, step: float, gain: float):
        self.backbone, self.gain = load_backbone(modelpool), gain
        self.base = {n: v.clone() for n, v in self.backbone.state_dict().items()}
        self.kept, self.x_excl = _coded(modelpool, step)

    def task(self, name: str) -> nn.Module:
        """The base model with what a task's stream says."""
        state = dict(self.base)
        for key, value in self.kept[name].items():
            state[key] = self.base[key] + self.gain * torch.from_numpy(value)
        self.backbone.load_state_dict(state)
        return self.backbone


@lru_cache(maxsize=1)
def _coded(
    modelpool: Any, step: float
) -> tuple[dict[str, dict[str, np.ndarray]], float]:
    """Decoded task vectors, and all streams in units of one fine-tuned model; gains share them."""
    base = load_backbone(modelpool).state_dict()
    kept, sizes, bits = {}, {}, 0
    for task in modelpool.model_names:
        tuned = modelpool.load_model(task).state_dict()
        changed = _changed(base, tuned)
        stream = encoded(changed, step)
        kept[task], bits = decoded(stream), bits + 8 * len(stream)
        sizes |= {name: 8 * value.nbytes for name, value in changed.items()}
    return kept, bits / sum(sizes.values())


def _changed(base: Mapping[str, Tensor], tuned: Mapping[str, Tensor]) -> dict[str, np.ndarray]:  # fmt: skip
    return {
        name: (tuned[name] - base[name]).float().numpy()
        for name in base
        if base[name].is_floating_point() and not tuned[name].equal(base[name])
    }
