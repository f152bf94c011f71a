"""Fine-tuned models without any loss, as differences of whole numbers from the base model."""

from fusion_bench import auto_register_config

from ...deltas.lossless import LosslessDelta
from ...deltas.plain import OwnDelta
from ...deltas.sink import EncodedTensor
from ...task_vectors.tensor import ChangedTensor
from ..base import DynamicMethod


@auto_register_config
class LosslessDifference(DynamicMethod):
    """Every bit of every fine-tuned model: what lossless coding reaches, beside which losses can be seen.

    Values and base values are read as whole numbers in the order of what they stand for; their differences go byte by byte
    through zlib. A tensor of another type than the base model's is kept as it is.

    Source: the idea of FM-Delta (NeurIPS 2024) and BitX (NSDI 2026), which have coders of their own for it.
    """

    title = "Lossless difference"

    def encode(self, tensor: ChangedTensor) -> EncodedTensor:
        base, experts = tensor.base(), []
        for task in range(len(tensor.ranks)):
            value = tensor.tuned(task)
            if value.dtype != base.dtype:
                experts.append(OwnDelta(tensor.shape, value))
            elif value.equal(base):
                experts.append(None)
            else:
                experts.append(LosslessDelta.of(value, base))
        return EncodedTensor(tensor.name, None, experts)
