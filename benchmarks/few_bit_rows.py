"""Methods of few bits at the settings of their dial: rows of the tables that hold them against the default."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

from fusion_bench_didi.programs.entries import Entry, composed


@dataclass(frozen=True)
class Row:
    """A method with settings; rows of one family and dial value are candidates, of which validation images choose.

    Args:
        family: what is joined to a curve.
        dial: where on the curve.
        method: name of its configuration.
        overrides: put into it.
    """

    family: str
    dial: str
    method: str
    overrides: Mapping[str, Any] = field(default_factory=dict)

    @property
    def place(self) -> str:
        """Where on which curve."""
        return f"{self.family} {self.dial}".rstrip()

    @property
    def key(self) -> str:
        settings = ",".join(f"{k}={v}" for k, v in self.overrides.items())
        return f"{self.method}[{settings}]"

    def config(self) -> dict[str, Any]:
        """The whole configuration of the method."""
        return {**_stock(self.method), **self.overrides}


@cache
def _stock(method: str) -> dict[str, Any]:
    return composed(Entry(method, method, method, "dynamic"))


#: Budgets of the default; those around 99 % first.
BUDGETS = (0.08, 0.12, 0.06, 0.17, 0.04, 0.1, 0.26, 0.03, 0.02, 0.015, 0.01)


def _didi(budgets: tuple[float, ...]) -> list[Row]:
    return [Row("DiDi", f"{b:g}", "didi", {"budget": b}) for b in budgets]


def _dare(drop: float, gains: tuple[float, ...], **form: Any) -> list[Row]:
    family = "DARE, 16 bits" if "positions" in form else "DARE, 4 bits"
    return [
        Row(family, f"{drop:.0%}", "didi/dare", {"drop": drop, **form, "gain": gain})
        for gain in gains
    ]


def _compeft(density: float, *alphas: float) -> list[Row]:
    return [
        Row("ComPEFT", f"{density:.0%}", "didi/compeft", {"density": density, "alpha": a})
        for a in alphas
    ]  # fmt: skip


def _t_switch(drop: float) -> list[Row]:
    return [
        Row("T-Switch", f"{drop:.0%}", "didi/t_switch", {"drop": drop, "norm": norm})
        for norm in ("kept", "whole")
    ]


def _ultra(drop: float) -> list[Row]:
    settings = {"drop": drop, "tensors": "all"}
    return [Row("UltraDelta", f"{drop:.0%}", "didi/ultra_delta", settings)]


def _come(bits: float) -> list[Row]:
    settings = {"bits": bits, "tensors": "matrices", "others": "bfloat16"}
    return [Row("Delta-CoMe", f"{bits:g} bits", "didi/delta_come", settings)]


def _tvq(width: int, **base: int) -> list[Row]:
    family = "RTVQ" if base else "TVQ"
    return [Row(family, f"{width} bits", "didi/tvq", {"width": width, **base})]


def _tsv(fraction: float | None) -> list[Row]:
    settings = {} if fraction is None else {"rank_fraction": fraction}
    return [Row("TSV-C", "1/8" if fraction is None else f"{fraction:g}", "didi/tsv_c", settings)]  # fmt: skip


def rows(budgets: tuple[float, ...] = BUDGETS, rivals: bool = True) -> list[Row]:
    """Every row, those first that the question needs most."""
    found = _didi(budgets)
    if not rivals:
        return found
    first = (
        _dare(0.9, (1.0, 0.7), width=4)
        + _dare(0.95, (1.0, 0.7), width=4)
        + _dare(0.8, (1.0,), width=4)
        + [Row("BitDelta", "", "didi/bitdelta", {"others": "bfloat16"})]
        + _t_switch(0.9)
        + _t_switch(0.6)
        + _compeft(0.1, 4.0, 6.0)
        + _compeft(0.4, 2.0)
        + _come(1.0)
        + _ultra(0.9)
        + [Row("UltraDelta, linear", "97%", "didi/ultra_delta", {"drop": 0.97})]
        + _tvq(3)
        + _tvq(2)
        + [Row("Averaging", "", "simple_average")]
    )
    second = (
        _dare(0.5, (1.0,), width=4)
        + _dare(0.99, (1.0, 0.5), width=4)
        + _come(0.5)
        + _come(2.0)
        + _ultra(0.97)
        + _tvq(2, base_width=3)
        + _t_switch(0.8)
        + _compeft(0.2, 3.0, 5.0)
        + _tsv(None)
        + [
            Row("EMR", "", "didi/emr"),
            Row("TALL + TIES", "", "didi/tall_mask"),
            Row("FREE", "", "didi/free"),
            Row("Twin-Merging", "", "didi/twin"),
        ]
        + _dare(0.9, (1.0,), positions="stored")
        + _dare(0.95, (1.0, 0.7), positions="stored")
        + _dare(0.99, (1.0, 0.5), positions="stored")
    )
    return [row for pair in zip(found, first) for row in pair] + [
        row for row in found[len(first) :] + first[len(found) :] + second
    ]


#: In the place of a method: no method of the package, see ``nncodec_rows.py``.
NNCODEC = "nncodec"
#: What FREE is told where names are BERT's.
_FREE_ON_TEXT = {"patterns": ["*attention*", "*intermediate*", "*output.dense*"]}


def rivals(*, text: bool = False) -> list[Row]:
    """Every method of few bits at every setting, more of them than over widths; candidates for one place follow one another.

    Args:
        text: tensors are BERT's.
    """
    found = [row for row in rows(()) if row.family != "Averaging"]
    found += (
        _dare(0.8, (0.85,), width=4)
        + _dare(0.97, (1.0, 0.7, 0.5), width=4)
        + [
            Row("UltraDelta", f"{drop:.0%}", "didi/ultra_delta", {"drop": drop, "tensors": "all", "gain": gain})
            for drop in (0.9, 0.97)
            for gain in (0.7, 0.5)
        ]
        + [Row("UltraDelta, linear", "97%", "didi/ultra_delta", {"drop": 0.97, "gain": 0.5})]
        + _t_switch(0.95)
        + _compeft(0.1, 3.0)
        + _come(0.25)
        + [Row("Lossless", "", "didi/lossless")]
        + [
            Row("NNCodec", f"step {step:g}", NNCODEC, {"step": step, "gain": gain})
            for step in (0.75, 1.0, 1.25, 1.5)
            for gain in (1.0, 1.2, 1.4, 1.7)
        ]
    )  # fmt: skip
    if text:
        found = [replace(r, overrides=_FREE_ON_TEXT) if r.family == "FREE" else r for r in found]  # fmt: skip
    places = list(dict.fromkeys(row.place for row in found))
    return sorted(found, key=lambda row: places.index(row.place))
