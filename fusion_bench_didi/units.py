"""Sizes as people read them."""

UNITS = ("bytes", "kB", "MB", "GB", "TB")


def readable(bits: float) -> str:
    """A size in bytes of the unit in which it has up to three digits before the point."""
    size = bits / 8
    for unit in UNITS[:-1]:
        if size < 999.5:
            break
        size /= 1000
    else:
        unit = UNITS[-1]
    digits = 0 if unit == "bytes" or size >= 99.5 else 1 if size >= 9.95 else 2
    return f"{size:.{digits}f} {unit}"
