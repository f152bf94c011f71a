"""``didi serve``."""

import socket
from typing import Any

import click

from . import options


@click.command(no_args_is_help=True)
@click.argument("directory")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen at; others than this machine's own let everyone ask.")  # fmt: skip
@click.option("--port", default=8000, show_default=True, type=click.IntRange(0, 65535), help="0 takes any that is free.")  # fmt: skip
@click.option("--heads", default=None, help="Safetensors with the classes of every task, for towers without heads.")  # fmt: skip
@click.option("--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), default=None, help="That the backbone is run in; as it was merged if left out.")  # fmt: skip
@options.base
@options.device
@options.settings
def serve(
    directory: str, host: str, port: int, settings: tuple[str, ...], **given: Any
) -> None:
    """Answer HTTP requests with a merged model: /v1/models, and /v1/completions and /v1/chat/completions, or /v1/classify, a model
    name per task.

    Requests of several tasks run in one batch. A task's own tokenizer or image processor makes its inputs, where its checkpoint
    still lies where the merge found it and has one; else the base model's. Settings are limits: body_kb, batch, queue, tokens,
    prompt_tokens, pixels, wait_ms and memory_limit_gb, of decoded tensors beside backbone and stored.

    \b
    Examples:
      didi serve merged
      didi serve merged --port 9000 -s tokens=64 -s memory_limit_gb=0.5
    """
    try:
        import uvicorn

        from ..service.app import make_app
    except ImportError as missing:
        raise click.UsageError(
            f"{missing.name} is not installed; pip install 'fusion-bench-didi[serve]'."
        ) from None
    from ..service.limits import Limits
    from ..service.opening import open_runner

    asked, names = options.values_of(settings), list(Limits.__dataclass_fields__)
    if unknown := set(asked) - set(names):
        raise click.BadParameter(f"no limit {', '.join(sorted(unknown))}; there are {', '.join(names)}.", param_hint="--set")  # fmt: skip
    limits = Limits(**asked)
    listening = _listening(host, port)  # before a model is read for nothing
    runner = open_runner(directory, limits=limits, **given)
    port = listening.getsockname()[1]
    click.echo(f"{len(runner.model.tasks)} tasks at http://{host}:{port}/v1/models")
    config = uvicorn.Config(make_app(runner, limits), log_level="warning")
    uvicorn.Server(config).run(sockets=[listening])


def _listening(host: str, port: int) -> socket.socket:
    """A socket that is bound; of port 0 to any that is free."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except OSError as error:
        raise click.UsageError(
            f"{host}, port {port}: {error.strerror}. Give another --port, or 0 for any that is free."
        ) from None
