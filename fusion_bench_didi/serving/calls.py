"""What a network is called with: how many samples it is of, and the same for some of the samples.

A sample is a row, the first side of a tensor, but for what transformers' models are known to be given otherwise. What is not
of one row per sample is the same for all samples.
"""

import inspect
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from torch import Tensor, nn

from ..errors import DiDiError
from .trees import (
    Path,
    first_tensor,
    holds_tensors,
    is_cache,
    is_own_cache,
    mapped,
    place,
)

#: Arguments that say nothing of a single sample, whatever their shape is.
FOR_ALL = frozenset(
    {
        "cache_position",
        "head_mask",
        "decoder_head_mask",
        "cross_attn_head_mask",
        "logits_to_keep",
        "num_items_in_batch",
    }
)
#: Arguments that tell the samples where the main input is not given, in this order.
INSTEAD = (
    "inputs",
    "input_ids",
    "inputs_embeds",
    "decoder_input_ids",
    "decoder_inputs_embeds",
    "encoder_outputs",
)
#: Where one of these is given, images and videos are cut into patches, and patches of all samples lie in one row.
PACKED_BY = ("image_grid_thw", "video_grid_thw")
#: Beginnings of the names of what samples have any number of.
MEDIA = ("pixel_", "image_", "video_", "audio_", "input_features", "feature_")
#: Arguments that may hold one image, video or sound in a row, and what their places in a text are called.
PLACES = {
    "pixel_values": "image",
    "pixel_values_images": "image",
    "pixel_values_videos": "video",
    "input_features": "audio",
}
#: Arguments by which a merged model is told the tasks of the samples.
TASKS = frozenset({"task_ids", "task_weights"})
#: Arguments in whose tensors the samples are the second side.
SECOND = frozenset({"mems"})


@dataclass
class Call:
    """Arguments of a backbone's forward or of another of its methods.

    Args:
        args, kwargs: as given.
        method: its name; None for the forward.
        names: of the parameters that may be given by position, in their order.
        main: the name of the argument that the samples come in, where it is known.
        also_for_all: names of more arguments that say nothing of a single sample.
        tokens: that stand in a text for images, videos and sounds, see :func:`media_tokens`.

    Attributes:
        size: how many samples there are.
        samples: the argument that tells, with its name.

    Raises:
        DiDiError: if none does.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    method: str | None = None
    names: tuple[str, ...] = ()
    main: str | None = None
    also_for_all: frozenset[str] = frozenset()
    tokens: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self):
        given, known = self.given, {*FOR_ALL, *self.also_for_all}
        first = (self.main, *INSTEAD, *self.names, *given)
        telling = [n for n in first if n in given and n not in known]
        name, self.size = next(
            ((n, size) for n in telling if (size := _samples(given[n])) is not None),
            ("", None),
        )
        if self.size is None:
            raise DiDiError(
                f"No argument of {self.method or 'forward'} tells how many samples there are: no tensor among {list(given)}. Set a "
                "task with set_task(...) for calls like this."
            )
        self.samples = name, given[name]
        self._for_all = known
        self._caches = [n for n, value in given.items() if is_cache(value)]

    def fits(self, count: int, what: str) -> None:
        """Check that there is one ``what`` per sample.

        Raises:
            DiDiError: naming both numbers; and for no sample at all.
        """
        if not self.size:
            raise DiDiError(
                "The batch holds no sample, so that there is nothing to run."
            )
        if count != self.size:
            name, value = self.samples
            tensor = first_tensor(value)
            seen = len(value) if tensor is None else tuple(tensor.shape)
            raise DiDiError(
                f"{count} {what} for a batch of {self.size} samples ({name or 'the input'} is {seen}). Give one per sample."
            )

    def check_media(self) -> None:
        """As many images as samples are one each only where every text has a place for some.

        Raises:
            DiDiError: where some have none, so that others have several.
        """
        given = self.given
        texts = given.get("input_ids")
        if not isinstance(texts, Tensor) or texts.ndim < 2:
            return
        for name in PLACES.keys() & given.keys():
            token, value = self.tokens.get(PLACES[name]), given[name]
            if token is None or not isinstance(value, Tensor):
                continue
            if name == "pixel_values" and value.ndim > 4 and "image_sizes" not in given:
                continue  # those of each sample in a row, filled up with empty ones
            without = (texts != token).all(1).nonzero().flatten().tolist()
            if 0 < len(without) < len(texts):
                raise DiDiError(
                    f"{name} {tuple(value.shape)} does not hold one row for each of the {self.size} samples: input_ids of samples "
                    f"{without} have no place for one (token {token}), so that samples of several tasks cannot be told apart in it. "
                    "Run the samples of each task by themselves."
                )

    def picked(self, index: Tensor) -> "Call":
        """The call with some of the samples only.

        Args:
            index: their positions; caches are copied, never shared with what was given.

        Raises:
            DiDiError: for arguments that cannot be told apart by sample.
        """
        for name in PACKED_BY:
            if self.kwargs.get(name) is not None:
                self._refuse(name)
        for name, value in self.given.items():
            if is_own_cache(value):
                self._refuse(name, type(value).__name__)

        def rows(name: str, value: Any) -> Any:
            if value is None or name in self._for_all:
                return value
            texts = value is self.samples[1] and isinstance(value, (list, tuple))
            if texts and isinstance(value[0], str):
                return type(value)(value[i] for i in index.tolist())
            return mapped(lambda path, leaf: self._rows(name, path, leaf, index), value)

        return self.changed(rows)

    def changed(self, other: Callable[[str, Any], Any]) -> "Call":
        """The call with ``other(name, value)`` in place of every value that is given."""
        args = (other(name, value) for name, value in self._positional())
        kwargs = {name: other(name, value) for name, value in self.kwargs.items()}
        return replace(self, args=tuple(args), kwargs=kwargs)

    def undivided(self, error: Exception) -> DiDiError:
        """What to say where the model takes all samples, and some of them not."""
        tensors = ((name, first_tensor(value)) for name, value in self.given.items())
        shapes = [f"{n} {tuple(x.shape)}" for n, x in tensors if x is not None]
        return DiDiError(
            f"The model runs on all {self.size} samples and not on some of them ({type(error).__name__}: {error}), so that samples of "
            f"several tasks cannot be told apart in what is given: {', '.join(shapes)}. Give tensors of one row per sample, or run the "
            "samples of each task by themselves."
        )

    def on(self, network: nn.Module) -> Any:
        """Run the call on a network; its output."""
        function = network if self.method is None else getattr(network, self.method)
        return function(*self.args, **self.kwargs)

    def kind(self) -> Hashable:
        """A key that is equal for calls whose outputs are laid out alike."""
        kwargs = {name: _kind(value) for name, value in self.kwargs.items()}
        return self.method, *map(_kind, self.args), *sorted(kwargs.items())

    @property
    def given(self) -> dict[str, Any]:
        """All arguments by name."""
        return {**dict(self._positional()), **self.kwargs}

    def _positional(self) -> Iterator[tuple[str, Any]]:
        for i, value in enumerate(self.args):
            yield (self.names[i] if i < len(self.names) else f"argument {i + 1}"), value

    def _rows(self, name: str, path: Path, leaf: Any, index: Tensor) -> Any:
        if isinstance(leaf, np.ndarray):
            own = leaf.ndim and len(leaf) == self.size
            return leaf[index.cpu().numpy()] if own else leaf
        if not isinstance(leaf, Tensor):
            if holds_tensors(leaf):
                self._refuse(place((name, *path)), type(leaf).__name__)
            return leaf
        inner = path[-1] if path and isinstance(path[-1], str) else name
        side = None if inner in self._for_all else self._side(inner, leaf)
        if side is not None:
            return leaf.index_select(side, index.to(leaf.device))
        if name in self._caches:
            if not leaf.ndim:  # how much it holds, which every part counts for itself
                return leaf.clone()
            if leaf.numel():
                self._refuse(place((name, *path)), tuple(leaf.shape))
        if name.startswith(MEDIA) and leaf.ndim and name != self.samples[0]:
            self._refuse(place((name, *path)), tuple(leaf.shape))
        return leaf

    def _side(self, name: str, tensor: Tensor) -> int | None:
        """The side of a tensor that is the samples."""
        if name.endswith("position_ids") and tensor.ndim == 3:
            return 1 if tensor.shape[1] == self.size else None
        if name in SECOND and tensor.ndim > 1 and tensor.shape[1] == self.size:
            return 1
        return 0 if tensor.ndim and len(tensor) == self.size else None

    def _refuse(self, name: str, found: Any = "given") -> None:
        raise DiDiError(
            f"{name} ({found}) does not hold one row for each of the {self.size} samples, so that samples of several tasks cannot "
            "be told apart in it. Run the samples of each task by themselves."
        )


def media_tokens(backbone: nn.Module) -> dict[str, int]:
    """Tokens that stand in a text for images, videos and sounds, as far as a configuration tells them."""
    config, found = getattr(backbone, "config", None), {}
    for kind in set(PLACES.values()):
        for name in (f"{kind}_token_index", f"{kind}_token_id"):
            if isinstance(token := getattr(config, name, None), int):
                found[kind] = token
    return found


def names_of_tasks(function: Callable[..., Any]) -> frozenset[str]:
    """Arguments of a backbone's function that are called as those by which a merged model is told the tasks."""
    try:
        return TASKS & inspect.signature(function).parameters.keys()
    except (TypeError, ValueError):  # functions that do not say
        return frozenset()


def check_meant(
    function: Callable[..., Any], args: tuple, task_ids: Any, task_weights: Any
) -> None:
    """What is given by the name of an argument of tasks must not be meant for an argument of the backbone's own.

    Args:
        args: given by position, among which the backbone's own may be.

    Raises:
        DiDiError: if that cannot be told.
    """
    given = {"task_ids": task_ids, "task_weights": task_weights}
    taken = names_of_tasks(function).difference(parameter_names(function)[: len(args)])
    for name in sorted(taken):
        if given[name] is not None:
            called = getattr(function, "__name__", "A function")
            raise DiDiError(
                f"{called} of the base model takes {name} itself, so that it cannot be told which one is meant by the name. Give its own "
                f"by position, beside which {name}= is of the tasks; or set a task with set_task(...) and call model.backbone, which knows "
                "its own only."
            )


def towers(backbone: nn.Module) -> tuple[str, ...]:
    """Methods that give what one of several towers makes of each sample, such as ``encode_image`` beside ``encode_text``."""
    found = [
        name
        for name in dir(type(backbone))
        if name.startswith("encode_")
        or (name.startswith("get_") and name.endswith("_features"))
    ]
    return tuple(found) if any("text" in name for name in found) else ()


def parameter_names(function: Callable[..., Any]) -> tuple[str, ...]:
    """Names of the parameters that may be given by position."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # functions that do not say
        return ()
    by_position = (
        inspect.Parameter.POSITIONAL_ONLY,
        inspect.Parameter.POSITIONAL_OR_KEYWORD,
    )
    return tuple(p.name for p in parameters if p.kind in by_position)


def _samples(value: Any) -> int | None:
    """How many samples an argument holds, if it tells."""
    texts = isinstance(value, (list, tuple)) and value and isinstance(value[0], str)
    if texts or (isinstance(value, np.ndarray) and value.ndim):
        return len(value)
    tensor = first_tensor(value)
    return None if tensor is None else len(tensor)


def _kind(value: Any) -> Hashable:
    if isinstance(value, Tensor):
        return "tensor", value.ndim, value.is_floating_point()
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, Mapping):
        return type(value), *sorted((str(k), _kind(v)) for k, v in value.items())
    if isinstance(value, (tuple, list)):
        texts = bool(value) and isinstance(value[0], str)
        return (type(value), str) if texts else (type(value), *map(_kind, value))
    return type(value)
