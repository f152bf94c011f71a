"""What tensors a stored form consists of: their types and shapes follow from the shape that it changes, so that headers tell
whether a file can be what its manifest says before anything is read.

Letters: ``m`` first side, ``n`` product of the others, ``r`` rank, ``p`` and ``q`` sides of a core.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..deltas.banded import BANDS
from ..deltas.base import Delta
from ..deltas.entries import CODE_WIDTHS
from ..deltas.kinds import KINDS
from ..deltas.masks import SparseDelta, unpack_bits
from ..deltas.plain import OwnDelta
from ..deltas.tucker import Bases, BasesDelta, Core, CoreDelta, RoundedCoreDelta
from ..errors import CheckpointMismatchError
from ..quantization.codes import WIDTHS, packed_size
from ..task_vectors.file_sources import DTYPES
from .fields import Field

#: safetensors' names of the types that factors and values may have
FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
_FLOATS_OF = {16: ("F16", "BF16"), 32: ("F32",), 64: ("F64",)}
#: all types that are stored; only a task's own tensors are of the others
TYPES = tuple(DTYPES)


@dataclass(frozen=True)
class Header:
    """Header of a stored tensor: safetensors' name of its type, and its shape."""

    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Entry:
    """A delta in the manifest.

    Args:
        task: None for the shared part.
        tensor: that it changes.
        kind: name of the form.
        shape: of the tensor.
        key: in front of its tensors' names in the file.
        options: as the form's constructor takes them.
        without: parts that it does not have.
        group: of tasks that share it, if not all do.
    """

    task: str | None
    tensor: str
    kind: str
    shape: tuple[int, ...]
    key: str
    options: Mapping[str, int]
    without: frozenset[str]
    group: str | None = None

    @property
    def sides(self) -> tuple[int, int]:
        """Sides m and n of the tensor as a matrix."""
        return self.shape[0], math.prod(self.shape[1:])

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


Found = Mapping[str, Header]
#: types that a part may have, and its shape
Part = tuple[tuple[str, ...], tuple[int, ...]]
Expected = dict[str, Part]


@dataclass(frozen=True)
class Form:
    """Expected parts and least dimensions of a stored form.

    Args:
        expected: types and shape of each part; ranks are those of the parts that are there.
        dims: smallest number of sides of the tensor.
        pairs: parts that are there or not together.
    """

    expected: Callable[[Entry, Found], Expected]
    dims: int = 1
    pairs: tuple[tuple[str, ...], ...] = ()


def side(tensors: Mapping[str, Header | Tensor], name: str, i: int) -> int:
    """A side of a tensor; one that nothing has where there is none."""
    shape = tensors[name].shape if name in tensors else ()
    return shape[i] if i < len(shape) else -1


def _rows(entry: Entry, found: Found, part: str) -> int:
    """Number of rows of a tensor that is stored by rows; a single column is one, or as many as it has entries, as in older files."""
    column = math.prod(entry.shape[1:]) == 1 and side(found, part, 0) == 1
    return 1 if column or len(entry.shape) < 2 else entry.shape[0]


def _floats(*shape: int) -> Part:
    return FLOATS, shape


def _bytes(*shape: int) -> Part:
    return ("U8",), shape


def _stream(found: Found, part: str) -> Part:
    """Bytes of any number, which is held against what they say where they are decoded."""
    return _bytes(side(found, part, 0))


def _packed(count: int, bits: int = 1) -> Part:
    return _bytes(packed_size(count, bits))


def _codes(bits: int, *shape: int) -> Part:
    return (("I8",), shape) if bits == 8 else _packed(math.prod(shape), bits)


def _dense(entry: Entry, found: Found) -> Expected:
    return {"value": _floats(*entry.shape)}


def _own(entry: Entry, found: Found) -> Expected:
    return {"value": (TYPES, entry.shape)}


def _low_rank(entry: Entry, found: Found) -> Expected:
    (m, n), r = entry.sides, side(found, "up", 1)
    return {"up": _floats(m, r), "down": _floats(r, n)}


def _spectral(entry: Entry, found: Found) -> Expected:
    return {**_low_rank(entry, found), "sigma": _floats(side(found, "up", 1))}


def _rounded_low_rank(entry: Entry, found: Found) -> Expected:
    (m, n), r, bits = entry.sides, side(found, "scale", 0), entry.options["bits"]
    up, down = _codes(bits, m, r), _codes(bits, r, n)
    return {"up": up, "down": down, "scale": _floats(r)}


def _rounded_dense(entry: Entry, found: Found) -> Expected:
    codes = _codes(entry.options["bits"], *entry.shape)
    return {"codes": codes, "scale": _floats(_rows(entry, found, "scale"))}


def _affine(entry: Entry, found: Found) -> Expected:
    return {"codes": _bytes(*entry.shape), "ends": _floats(2)}


def _masked(entry: Entry, found: Found) -> Expected:
    return {"mask": _packed(entry.numel), "scale": _floats()}


def _signed(entry: Entry, found: Found) -> Expected:
    return {"negative": _packed(entry.shape[-1])}


def _sparse(entry: Entry, found: Found) -> Expected:
    count, mask = side(found, "values", 0), found["where"].dtype == "U8"
    where = _packed(entry.numel) if mask else (("I32",), (count,))
    return {"where": where, "values": _floats(count)}


def _uniform(entry: Entry, found: Found) -> Expected:
    width = entry.options["width"]
    _, shape = _packed(entry.numel, width)
    return {"codes": (_code_types(width), shape), "ends": _floats(2)}


def _code_types(width: int) -> tuple[str, ...]:
    return ("U8",) if width in CODE_WIDTHS else ()


def _some_values(entry: Entry, found: Found) -> Expected:
    """Codes with ends or floats without, as the width says; of how many entries is told by positions alone."""
    width, count = entry.options["width"], (side(found, "values", 0),)
    if "ends" in found:
        return {"values": (_code_types(width), count), "ends": _floats(2)}
    return {"values": (_FLOATS_OF.get(width, ()), count)}


def _scattered(entry: Entry, found: Found) -> Expected:
    where, table = _stream(found, "where"), (("U16",), (2,))
    return {"where": where, "table": table, **_some_values(entry, found)}


def _lossless(entry: Entry, found: Found) -> Expected:
    return {"stream": _stream(found, "stream"), "like": _floats(0)}


def _banded(entry: Entry, found: Found) -> Expected:
    parts = {part: _stream(found, part) for part in ("up", "down")}
    scale, ranks = _floats(side(found, "scale", 0)), (("I32",), (len(BANDS),))
    return {**parts, "scale": scale, "ranks": ranks}


def _coded(entry: Entry, found: Found) -> Expected:
    classes = _bytes(_rows(entry, found, "classes"))
    return {"stream": _stream(found, "stream"), "step": _floats(1), "classes": classes}


def _coded_low_rank(entry: Entry, found: Found) -> Expected:
    lines = _stream(found, "short")
    stream, step = _stream(found, "stream"), _floats(1)
    return {"stream": stream, "step": step, "short": lines, "long": lines}


def _bases(entry: Entry, found: Found) -> Expected:
    m, n = entry.sides
    up, down = _floats(m, side(found, "up", 1)), _floats(side(found, "down", 0), n)
    return {k: part for k, part in (("up", up), ("down", down)) if k in found}


def _rounded_bases(entry: Entry, found: Found) -> Expected:
    parts, bits = {}, entry.options["bits"]
    for part, width in zip(("up", "down"), entry.sides):
        if part in found:
            rows = side(found, f"{part}_scale", 0)
            parts[part] = _codes(bits, rows, width)
            parts[f"{part}_scale"] = _floats(rows)
    return parts


def _core(entry: Entry, found: Found) -> Expected:
    return {"value": _floats(side(found, "value", 0), side(found, "value", 1))}


def _rounded_core(entry: Entry, found: Found) -> Expected:
    p, q = side(found, "scale", 0), entry.options["columns"]
    return {"codes": _codes(entry.options["bits"], p, q), "scale": _floats(p)}


FORMS: dict[str, Form] = {
    "dense": Form(_dense, dims=0),
    "own": Form(_own, dims=0),
    "low_rank": Form(_low_rank),
    "spectral": Form(_spectral),
    "rounded_low_rank": Form(_rounded_low_rank),
    "rounded_dense": Form(_rounded_dense, dims=0),
    "affine8": Form(_affine, dims=0),
    "masked": Form(_masked, dims=0),
    "signed": Form(_signed),
    "sparse": Form(_sparse, dims=0),
    "uniform": Form(_uniform, dims=0),
    "scattered": Form(_scattered, dims=0),
    "seeded": Form(_some_values, dims=0),
    "banded_low_rank": Form(_banded),
    "coded": Form(_coded, dims=0),
    "coded_low_rank": Form(_coded_low_rank),
    "lossless": Form(_lossless, dims=0),
    "bases": Form(_bases),
    "rounded_bases": Form(
        _rounded_bases, pairs=(("up", "up_scale"), ("down", "down_scale"))
    ),
    "core": Form(_core),
    "rounded_core": Form(_rounded_core),
}


def options_of(field: Field, kind: str) -> dict[str, int]:
    """The constructor arguments of a form beside shape and tensors."""
    names = list(KINDS[kind].numbers)
    if sorted(field.mapping()) != sorted(names):
        field.fail(f"exactly {names}")
    found = {name: field[name].integer(1) for name in names}
    if found.get("bits", WIDTHS[0]) not in WIDTHS:
        field["bits"].fail(f"one of {WIDTHS}")
    if found.get("width", 8) not in (*CODE_WIDTHS, *_FLOATS_OF):
        field["width"].fail(f"one of {(*CODE_WIDTHS, *_FLOATS_OF)}")
    return found


def check_parts(entry: Entry, found: Found, place: Path) -> None:
    """Headers of a delta's tensors must be those of its form.

    Raises:
        CheckpointMismatchError: naming the first that is not.
    """
    form = FORMS[entry.kind]
    for pair in form.pairs:
        if 0 < len(entry.without.intersection(pair)) < len(pair):
            raise CheckpointMismatchError(
                f"{place}: {entry.key} is without {sorted(entry.without)}, expected {' and '.join(pair)} together or neither. "
                "Write the model again."
            )
    for part, (types, shape) in form.expected(entry, found).items():
        header = found[part]
        if header.dtype not in types or header.shape != shape:
            raise CheckpointMismatchError(
                f"{place}: tensor {entry.key}.{part} is {header.dtype} {header.shape}, expected {' or '.join(types)} {shape} "
                f"for a change of shape {entry.shape} stored as {entry.kind}. Write the model again."
            )


def check_content(delta: Delta, entry: Entry, place: Path) -> None:
    """Check what headers do not tell: positions must be those of entries, each once.

    Raises:
        CheckpointMismatchError: if they are not.
    """
    if not isinstance(delta, SparseDelta):
        return
    where, count = delta.where, len(delta.values)
    if where.dtype == torch.uint8:
        right = int(unpack_bits(where, (entry.numel,)).sum()) == count
    else:
        ends = where[:1].ge(0).all() and where[-1:].lt(entry.numel).all()
        right = bool(ends and (where[1:] > where[:-1]).all())
    if not right:
        raise CheckpointMismatchError(
            f"{place}: {entry.key}.where does not tell {count} ascending positions in a tensor of shape {entry.shape}. Write "
            "the model again."
        )


def check_together(
    task: str, name: str, delta: Delta, shared: Delta | None, place: Path
) -> None:
    """A task's delta and the shared one of the same tensor must fit.

    Raises:
        CheckpointMismatchError: if they do not.
    """
    if isinstance(delta, OwnDelta):
        return
    fits = shared is None or shared.shape == delta.shape
    if isinstance(delta, Core):
        fits = fits and isinstance(shared, Bases) and _sides(delta) == _room(shared)
    elif delta.kind in ("masked", "signed"):
        fits = fits and shared is not None
    if not fits:
        found = "nothing" if shared is None else f"{shared.kind} of {shared.shape}"
        raise CheckpointMismatchError(
            f"{place}: {name} is {delta.kind} of {delta.shape} for {task!r}, which does not go with the shared part of it "
            f"({found}). Write the model again."
        )


#: forms that are nothing by themselves, or only for themselves
NEVER_SHARED = ("own", "lossless", "masked", "signed", "core", "rounded_core")
NEVER_OF_A_TASK = ("bases", "rounded_bases")


def _sides(core: Delta) -> tuple[int, int]:
    if isinstance(core, RoundedCoreDelta):
        return len(core.scale), core.columns
    assert isinstance(core, CoreDelta)
    return tuple(core.value.shape)


def _room(bases: Bases) -> tuple[int, int]:
    """p and q of the cores that are written in these bases."""
    (m, n), plain = bases.sides, isinstance(bases, BasesDelta)
    up: Tensor | None = bases.up if plain else bases.up_scale
    down: Tensor | None = bases.down if plain else bases.down_scale
    p = m if up is None else up.shape[-1]
    return p, n if down is None else down.shape[0]


def read_header(handle: Any, name: str) -> Header:
    """Header of a tensor in an open safetensors file."""
    view = handle.get_slice(name)
    return Header(view.get_dtype(), tuple(view.get_shape()))
