"""Sizes and storage accounts as people read them."""

from collections.abc import Mapping

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


def storage_units(storage: Mapping) -> dict[str, float]:
    """An account in the units that people ask for.

    Args:
        storage: as by ``StorageReport.as_dict``.

    Returns:
        ``x_excl``, ``x_incl``: in fine-tuned models, without and with the backbone; ``megabytes`` beyond the backbone;
        ``x_of_all``: with the backbone, against keeping every fine-tuned model.
    """
    tasks = max(len(storage["expert_bits"]), 1)
    return {
        "x_excl": storage["x_excl"],
        "x_incl": storage["x_incl"],
        "megabytes": storage["x_excl"] * storage["unit_bits"] / 8e6,
        "x_of_all": storage["x_incl"] / tasks,
    }


def storage_line(storage: Mapping) -> str:
    """The storage account in a line."""
    units, tasks = storage_units(storage), len(storage["expert_bits"])
    size = readable(storage["x_excl"] * storage["unit_bits"])
    return (
        f"{units['x_excl']:.2f}x of one fine-tuned model = {size} beyond the backbone; {units['x_incl']:.2f}x with it, "
        f"{units['x_of_all']:.2f}x of keeping all {tasks} models"
    )
