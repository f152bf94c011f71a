"""What a service accepts."""

from dataclasses import dataclass

from ..errors import DiDiError
from ..options import Gigabytes, PositiveCount, check_fields


class Refused(DiDiError):
    """A request that is not answered.

    Args:
        status: of HTTP.
        reason: for the caller.
    """

    def __init__(self, status: int, reason: str):
        super().__init__(reason)
        self.status = status


@dataclass(frozen=True)
class Limits:
    """Bounds of requests and of what is worked on at the same time.

    Args:
        body_kb: of a request.
        batch: rows of one forward, and inputs of one request.
        queue: rows that wait; more are refused with 429.
        tokens: that one prompt is continued by.
        prompt_tokens: of one prompt or text.
        pixels: of an image as it is sent.
        wait_ms: for other requests before a batch begins that is not full.
        memory_limit_gb: of decoded tensors that are held for the next batch, see
            :class:`~fusion_bench_didi.serving.banks.Serving`; None for all.
    """

    body_kb: PositiveCount = 1024
    batch: PositiveCount = 16
    queue: PositiveCount = 128
    tokens: PositiveCount = 256
    prompt_tokens: PositiveCount = 1024
    pixels: PositiveCount = 4_000_000
    wait_ms: PositiveCount = 5
    memory_limit_gb: Gigabytes | None = None

    def __post_init__(self):
        check_fields(self)
