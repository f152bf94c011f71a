"""Names of tasks and tensors as parts of torch's names, which hold no dots.

As in JSON pointers (RFC 6901) ``~`` is written ``~0`` and ``/`` is written ``~1``; a dot then becomes ``/``. No two names
are written alike, and every name comes back as it was.
"""


def escaped(name: str) -> str:
    """A name without its dots: ``encoder.layers.0`` as ``encoder/layers/0``."""
    return name.replace("~", "~0").replace("/", "~1").replace(".", "/")


def unescaped(key: str) -> str:
    """The name that :func:`escaped` was given."""
    return key.replace("/", ".").replace("~1", "/").replace("~0", "~")
