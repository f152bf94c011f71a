"""Outputs of parts of a batch as the output of the batch: every sample's own rows, or an error.

How an output is laid out is learned from runs of two and of three samples: sides that grow with them are the samples, and items of
lists that do (features of images in LLaVA of transformers 5). What does not grow must be equal in all parts, but for a loss, which is
worked out anew where it is known how.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import DiDiError
from .losses import asking_for_losses, with_loss
from .trees import (
    Differing,
    Path,
    children,
    counts_samples,
    holds_tensors,
    leaves,
    mapped,
    place,
)

#: the sides of a tensor that are the samples, with how many rows each has there; None where it is neither of all samples
#: together nor of each
Sides = tuple[tuple[int, int], ...] | None


@dataclass(frozen=True)
class Layout:
    """Where the samples are in an output.

    Args:
        sides: by path, for every tensor; also for numbers that grow with the samples, as None.
        usual: whether samples are where they are taken to be if nothing was learned.
        lists: paths of lists of one item for each sample.
        steady: paths of numbers that were equal for two samples and for three, as weights are.
    """

    sides: Mapping[Path, Sides]
    usual: bool = True
    lists: frozenset[Path] = frozenset()
    steady: frozenset[Path] = frozenset()

    @classmethod
    def of(cls, two: Any, three: Any) -> "Layout":
        """From the outputs for two samples, and for these two and the first again.

        Raises:
            DiDiError: if their structures differ.
        """
        sides: dict[Path, Sides] = {}
        lists = frozenset(_growing(two, three))
        usual = not lists
        found, other = leaves(two, lists), leaves(three, lists)
        if found.keys() != other.keys():
            raise DiDiError(
                "The output's structure depends on the number of samples; run the samples of each task by themselves."
            )
        for path, value in found.items():
            if isinstance(value, Tensor):
                sides[path] = _sides(tuple(value.shape), tuple(other[path].shape))
                usual = usual and sides[path] == _as_usual(value, 2)
            elif isinstance(value, (int, float)) and value != other[path]:
                if not counts_samples(path):
                    sides[path] = None
        tensors = {p: v for p, v in found.items() if isinstance(v, Tensor)}
        steady = (p for p, v in tensors.items() if not v.ndim and v.equal(other[p]))
        return cls(sides, usual, lists, frozenset(steady))

    @property
    def separable(self) -> bool:
        """Whether all tensors are of one row, or several, per sample."""
        return all(
            sides is not None and len(sides) == 1 for sides in self.sides.values()
        )

    def covers(self, output: Any, size: int) -> bool:
        """Whether the layout is that of all tensors of an output for so many samples."""
        return all(
            path in self.sides and _fits(value, self.sides[path], size)
            for path, value in leaves(output, self.lists).items()
            if isinstance(value, Tensor)
        )


def _growing(two: Any, three: Any, path: Path = ()) -> Iterator[Path]:
    """Paths of the lists of one item for each sample, of a form that is the sample's own wherever it is in the batch."""
    first, other = children(two), children(three)
    if first is None or other is None:
        return
    lists = isinstance(two, (tuple, list)) and type(two) is type(three)
    if lists and (len(first), len(other)) == (2, 3):
        if all(map(_alike, three, (*two, two[0]))):
            yield path
        return
    for key in first.keys() & other.keys():
        yield from _growing(first[key], other[key], (*path, key))


def _alike(one: Any, other: Any) -> bool:
    """Whether two things have the same structure, and their tensors the same shapes."""
    shapes = (
        {path: getattr(leaf, "shape", None) for path, leaf in leaves(value).items()}
        for value in (one, other)
    )
    return next(shapes) == next(shapes)


def _sides(two: tuple[int, ...], three: tuple[int, ...]) -> Sides:
    if len(two) != len(three):
        return None
    grown = []
    for side, (a, b) in enumerate(zip(two, three)):
        if a != b:
            if a % 2 or b * 2 != a * 3:
                return None
            grown.append((side, a // 2))
    return tuple(grown)


def _fits(value: Tensor, sides: Sides, size: int) -> bool:
    """Whether a tensor has the rows of so many samples."""
    return all(
        side < value.ndim and value.shape[side] == size * rows
        for side, rows in sides or ()
    )


#: for outputs nothing was learned of: tensors of as many rows as samples are theirs
def _as_usual(value: Tensor, size: int) -> Sides:
    if not value.ndim or not size or value.shape[0] % size:
        return ()
    return ((0, value.shape[0] // size),)


def reordered(output: Any, order: Tensor, layout: Layout | None) -> Any:
    """The output of a batch whose samples were sorted, as the batch was given.

    Args:
        order: (B,) where the samples are in the batch as given.
        layout: None: tensors of as many rows as samples, or a multiple, are theirs.

    Raises:
        DiDiError: for what cannot be told apart by sample.
    """
    size, back = len(order), order.argsort()
    lists = layout.lists if layout is not None else ()

    def leaf(path: Path, value: Any) -> Any:
        if path in lists:
            return _picked(path, [value], [order], back)
        if not isinstance(value, Tensor):
            return _checked(path, value, layout)
        sides = _as_usual(value, size) if layout is None else layout.sides.get(path)
        if sides is None or not _fits(value, sides, size):
            raise _mixing(path, value)
        for side, rows in sides:
            value = value.index_select(
                side, rows_of_samples(back, rows).to(value.device)
            )
        return value

    return mapped(leaf, output, closed=lists)


def joined(
    parts: Sequence[Any],
    orders: Sequence[Tensor],
    layout: Layout,
    *,
    names: Callable[[int], str],
    given: Sequence[Mapping[str, Any]] = (),
    ways: Sequence[str] = (),
) -> Any:
    """Outputs of parts of a batch as one.

    Args:
        orders: of each part, where its samples are in the batch as given.
        names: of the tasks of a part.
        given: arguments of each part, to work a loss out of the labels.
        ways: methods that give less and may be called in place of this, for messages.

    Raises:
        DiDiError: for what cannot be told apart by sample, and for tasks whose outputs are of different shapes.
    """
    back = torch.cat(list(orders)).argsort()
    losses: list[Path] = []

    def leaf(path: Path, *values: Any) -> Any:
        if path in layout.lists:
            return _picked(path, values, orders, back)
        if all(isinstance(value, Tensor) for value in values):
            sides = layout.sides.get(path)
            sized = zip(values, map(len, orders))
            if not all(_fits(value, sides, size) for value, size in sized):
                sides = None
            if sides is None or len(sides) > 1:
                raise _mixing(path, values[0], ways)
            if sides:
                return _side_by_side(path, values, sides[0], back, names)
            if all(v.shape == values[0].shape and v.equal(values[0]) for v in values):
                return values[0]
            if values[0].ndim == 0 and values[0].is_floating_point():
                losses.append(path)
                return values[0]
            raise _of_tasks([path], [values], names, ways)
        first = _checked(path, values[0], layout)
        if counts_samples(path):
            return sum(map(len, orders))
        if any(type(value) is not type(first) or value != first for value in values):
            raise DiDiError(
                f"{place(path)} is {values[0]!r} for {names(0)} and something else for other tasks; run the samples of each task "
                "by themselves."
            )
        return first

    try:
        whole = mapped(leaf, *parts, closed=layout.lists)
    except Differing as what:
        raise DiDiError(
            f"The outputs for {' and for '.join(names(i) for i in range(len(parts)))} differ in structure: {what}. Run the samples "
            "of each task by themselves."
        ) from None
    if not losses:
        return whole
    if (found := with_loss(whole, parts, losses, given, back)) is not None:
        return found
    asking = asking_for_losses(given)
    if not asking:
        held = [leaves(part) for part in parts]
        values = [[h[path] for h in held] for path in losses]
        raise _of_tasks(losses, values, names, ways)
    raise DiDiError(
        f"{_listed(losses)} of the samples of one task each, as a mean or sum is, and how to add that up is not known here. Leave out "
        f"what asks for it ({', '.join(asking)}), and work it out from the other outputs."
    )


def _side_by_side(
    path: Path,
    values: Sequence[Tensor],
    side: tuple[int, int],
    back: Tensor,
    names: Callable[[int], str],
) -> Tensor:
    at, rows = side
    others = [v.shape[:at] + v.shape[at + 1 :] for v in values]
    for i, other in enumerate(others):
        if other != others[0]:
            raise DiDiError(
                f"{place(path)} is {tuple(values[0].shape)} for {names(0)} and {tuple(values[i].shape)} for {names(i)}: outputs of "
                "different shapes are not one batch. Run the samples of each task by themselves."
            )
    whole = torch.cat(list(values), at)
    return whole.index_select(at, rows_of_samples(back, rows).to(whole.device))


def _picked(
    path: Path, lists: Sequence[Any], orders: Sequence[Tensor], back: Tensor
) -> Sequence[Any]:
    """Lists of one item for each sample as one, in another order."""
    for one, order in zip(lists, orders):
        if not isinstance(one, (tuple, list)) or len(one) != len(order):
            raise DiDiError(
                f"{place(path)} holds one thing for each of several samples, and something else for {len(order)}; run the samples of "
                "each task by themselves."
            )
    items = [item for one in lists for item in one]
    return type(lists[0])(items[i] for i in back.tolist())


def rows_of_samples(index: Tensor, rows: int) -> Tensor:
    """Rows of samples that have several each, side by side."""
    if rows == 1:
        return index
    return (index[:, None] * rows + torch.arange(rows, device=index.device)).flatten()


def _checked(path: Path, value: Any, layout: Layout | None) -> Any:
    """A leaf that is no tensor, which must say nothing of single samples."""
    grows = layout is not None and path in layout.sides
    if grows or holds_tensors(value):
        raise DiDiError(
            f"{place(path)}, a {type(value).__name__}, holds something of every sample that cannot be told apart; run the samples "
            "of each task by themselves."
        )
    return value


def _mixing(path: Path, value: Tensor, ways: Sequence[str] = ()) -> DiDiError:
    return DiDiError(
        f"{place(path)} of shape {tuple(value.shape)} is of all samples of a task together, so that there is none for a batch of "
        f"several tasks; {_instead(ways)}, or work it out from the other outputs."
    )


def _of_tasks(
    paths: Sequence[Path],
    values: Sequence[Sequence[Tensor]],
    names: Callable[[int], str],
    ways: Sequence[str],
) -> DiDiError:
    """The error for what has no row per sample, and is another for other tasks.

    Args:
        values: of each path, those of the parts.
    """

    def shown(value: Tensor) -> str:
        if value.numel() == 1:
            return f"{value.item():.6g}"
        return f"of shape {tuple(value.shape)}"

    told = (
        " and ".join(f"{shown(v)} for {names(i)}" for i, v in enumerate(one[:2]))
        for one in values
    )
    return DiDiError(
        f"{_listed(paths)} one for each task ({'; '.join(told)}), as a weight of the model is, or a mean or sum over samples that its "
        f"configuration asks for, so that there is none for a batch of several tasks; {_instead(ways)}."
    )


def _listed(paths: Sequence[Path]) -> str:
    return f"{' and '.join(map(place, paths))} {'are' if len(paths) > 1 else 'is'}"


def _instead(ways: Sequence[str]) -> str:
    """What to do in place of a call whose outputs are not one batch."""
    alone = "run the samples of each task by themselves"
    if not ways:
        return alone
    return f"call {' or '.join(ways)}, which take task_ids too, or {alone}"
