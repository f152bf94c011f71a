"""What configurations say of numbers that stand for others, which quantizers write."""

from collections.abc import Mapping
from typing import Any

#: Values of ``quant_method`` by which every matrix in float8 has a scale, which is read.
SCALED = ("fp8", "fbgemm_fp8", "compressed-tensors")
#: Those by which transformers may load plain numbers all the same: decoded, or rounded in the forward only.
_PLAIN = (*SCALED, "mxfp4", "bitnet")
#: That which quantizes nothing where neither ``load_in_8bit`` nor ``load_in_4bit`` is true.
_BY_BITS = "bitsandbytes"


def quantization(config: Any) -> Mapping[str, Any]:
    """What a configuration says of its numbers, as transformers keeps it: in a file, in a dictionary or in an object."""
    if isinstance(config, Mapping):
        found = config.get("quantization_config")
    else:
        found = getattr(config, "quantization_config", None)
    found = found.to_dict() if hasattr(found, "to_dict") else found
    return found if isinstance(found, Mapping) else {}


def unread(config: Any) -> str | None:
    """The ``quant_method`` of a configuration whose numbers cannot be read; None where there is none, or they can."""
    told = quantization(config)
    method = told.get("quant_method")
    if method in (None, _BY_BITS):  # files of its first releases name no method
        asked = told.get("load_in_8bit") or told.get("load_in_4bit")
        method = _BY_BITS if asked else None
    if method is None or method in _PLAIN:
        return None
    return str(getattr(method, "value", method))
