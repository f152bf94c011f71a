"""Damage to saved files: bits, bytes, fields of JSON, headers of tensors, and files that are something else; sealed again or not."""

import copy
import hashlib
import json
import os
import random
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fusion_bench_didi.checkpoint.fields import CHECKSUM, checksum

VALUES = (
    *(None, True, False, 0, 1, -1, 2, 3, 4, 5, 7, 8, 9, 255, 2**16, 40000),
    *(2**31, 2**32, 2**62, 2**63, 10**30, 0.5, -0.0, 1e308, float("nan"), float("inf")),
    *("", "x", ".", "..", "../x", "a/b", "/etc/passwd", "\0", "\ud800", "é", "x" * 999),
    *(
        [],
        {},
        [[]],
        [1, 2],
        [-1],
        [40000, 40000],
        [2**40] * 3,
        {"_target_": "os.system"},
    ),
    *("(a|aa)+$", "(?R)", "[", "dense", "own", "sparse", "masked", "core", "int8"),
)


def mutate(place: Path, rng: random.Random) -> None:
    """Change a few things, and perhaps seal them again."""
    seal = rng.random() < 0.6
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        files = sorted(p for p in place.rglob("*") if p.is_file() and p.suffix != ".md")
        if not files:
            return
        file = rng.choice(files)
        if rng.random() < 0.04:
            _replace(file, place, rng)
        elif file.suffix == ".json" and rng.random() < 0.7:
            _mutate_json(file, rng)
        elif file.suffix == ".safetensors" and rng.random() < 0.6:
            _mutate_header(file, rng)
        else:
            _mutate_bytes(file, rng)
    if seal:
        reseal(place)


def reseal(place: Path) -> None:
    """Make all checksums right."""
    files = (path for path in place.rglob("*.json") if path.is_file())
    for file in sorted(files, key=lambda path: -len(path.parts)):
        try:
            found = json.loads(file.read_text())
            _redigest(found, file.parent)
            if CHECKSUM in found:
                found[CHECKSUM] = checksum(found)
            file.write_text(json.dumps(found))
        except (OSError, ValueError, TypeError, RecursionError):
            continue


def _redigest(value: Any, place: Path) -> None:
    if isinstance(value, dict):
        home = value.get("directory")
        for key, inner in value.items():
            if key in ("files", "backbone_files") and isinstance(inner, dict):
                sub = home if isinstance(home, str) else ""
                sub = "backbone" if key == "backbone_files" else sub
                for name in inner:
                    inner[name] = _sha(place / sub / name) or inner[name]
            elif key == "sha256":
                value[key] = _sha(place / "router.safetensors") or inner
            else:
                _redigest(inner, place)
    elif isinstance(value, list):
        for inner in value:
            _redigest(inner, place)


def _sha(file: Path) -> str | None:
    try:
        regular = file.is_file()
    except ValueError:
        regular = False
    return hashlib.sha256(file.read_bytes()).hexdigest() if regular else None


def _replace(file: Path, place: Path, rng: random.Random) -> None:
    kind = rng.choice(("gone", "fifo", "directory", "link", "loop", "device", "empty"))
    file.unlink()
    if kind == "fifo":
        os.mkfifo(file)
    elif kind == "directory":
        file.mkdir()
    elif kind == "empty":
        file.touch()
    elif kind != "gone":
        outside = place.parent / "outside"
        target = {"link": outside, "loop": file, "device": "/dev/zero"}[kind]
        os.symlink(target, file)


def _mutate_bytes(file: Path, rng: random.Random) -> None:
    data = bytearray(file.read_bytes())
    at = rng.randrange(len(data) or 1)
    kind = rng.choice(("bit", "bit", "byte", "cut", "insert", "repeat", "front"))
    if kind == "cut" or not data:
        del data[at:]
    elif kind == "bit":
        data[at] ^= 1 << rng.randrange(8)
    elif kind == "byte":
        data[at] = rng.randrange(256)
    elif kind == "insert":
        data[at:at] = rng.randbytes(rng.randrange(1, 9))
    elif kind == "repeat":
        data[at:at] = data[at : at + rng.randrange(1, 200)]
    else:
        at = rng.randrange(min(16, len(data)))
        data[at] = rng.choice((0, 1, 255, rng.randrange(256)))
    file.write_bytes(data)


def _mutate_json(file: Path, rng: random.Random) -> None:
    try:
        found = json.loads(file.read_text())
    except (ValueError, RecursionError):
        return _mutate_bytes(file, rng)
    if rng.random() < 0.02:
        text = rng.choice(
            ("[" * 10**5, '{"a":' * 10**5, "1" * 5000, "", "null", "\ufeff{}")
        )
        file.write_text(text)
        return
    file.write_text(json.dumps(_changed(found, rng)))


def _changed(found: Any, rng: random.Random) -> Any:
    nodes = list(_nodes(found))
    if not nodes:
        return rng.choice(VALUES)
    # names of what is stored are many, and fields are few
    owner, key = rng.choice(nodes)
    shallow = [n for n in nodes if n[0] is found]
    if shallow and rng.random() < 0.3:
        owner, key = rng.choice(shallow)
    kind = rng.choice(("value", "value", "gone", "other", "near", "twice", "key"))
    if kind == "gone":
        del owner[key]
    elif kind == "other":
        other = rng.choice(nodes)
        owner[key] = copy.deepcopy(other[0][other[1]])
    elif kind == "near" and isinstance(owner[key], (int, float)):
        owner[key] = owner[key] + rng.choice((-1, 1, 2, -owner[key]))
    elif kind == "twice" and isinstance(owner, list):
        owner.insert(key, copy.deepcopy(owner[key]))
    elif kind == "key" and isinstance(owner, dict):
        owner[str(rng.choice(VALUES))] = owner.pop(key)
    else:
        owner[key] = copy.deepcopy(rng.choice(VALUES))
    return found


def _nodes(value: Any) -> Iterator[tuple[Any, Any]]:
    pairs = value.items() if isinstance(value, dict) else ()
    pairs = enumerate(value) if isinstance(value, list) else pairs
    for key, inner in list(pairs):
        yield value, key
        yield from _nodes(inner)


def _mutate_header(file: Path, rng: random.Random) -> None:
    data = file.read_bytes()
    try:
        (size,) = struct.unpack("<Q", data[:8])
        header = json.loads(data[8 : 8 + size])
    except (struct.error, ValueError):
        return _mutate_bytes(file, rng)
    header = _changed(header, rng) if rng.random() < 0.5 else _retyped(header, rng)
    try:
        text = json.dumps(header).encode()
    except UnicodeEncodeError:
        return
    file.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size :])


def _retyped(header: Any, rng: random.Random) -> Any:
    """The same bytes as numbers of another type, or in another shape."""
    entries = [v for v in header.values() if isinstance(v, dict) and "shape" in v]
    if not entries:
        return header
    entry = rng.choice(entries)
    types = {1: ("I8", "U8", "BOOL", "F8_E4M3"), 2: ("F16", "BF16", "I16", "U16")}
    types |= {4: ("F32", "I32", "U32"), 8: ("F64", "I64", "U64", "C64")}
    for same in types.values():
        if entry.get("dtype") in same and rng.random() < 0.6:
            entry["dtype"] = rng.choice(same)
            return header
    shape = entry["shape"]
    if isinstance(shape, list) and all(isinstance(s, int) for s in shape):
        count = 1
        for side in shape:
            count *= side
        choices = [[count], [1, count], [count, 1], [1, 1, count], shape[::-1]]
        entry["shape"] = rng.choice(choices)
    return header
