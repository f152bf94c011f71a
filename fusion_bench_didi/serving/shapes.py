"""What modules and configurations say of the shapes of their tensors, which must follow where a task's tensor is of another.

A head of another number of classes is a tensor of another shape, and ``out_features`` of its layer, and ``num_labels`` and
``id2label`` of the model and its configuration, without which the model computes no loss and cannot be loaded again.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from ..task_vectors.layers import is_conv1d
from ..task_vectors.ties import tied_names

Shape = tuple[int, ...]
#: How models are called that have one class more than labels, for no object.
_OF_OBJECTS = ("ForObjectDetection", "ForSegmentation", "ForUniversalSegmentation")
#: an object, one of its attributes, and what that is to be
Setting = tuple[Any, str, Any]


class Shapes:
    """Shape settings that a model was loaded with, and what must be set where some tensor is of another shape.

    Args:
        model: as it was loaded. Copies of it may be given to the methods.
    """

    def __init__(self, model: nn.Module):
        config = getattr(model, "config", None)
        self.labels = getattr(config, "num_labels", None)
        self.names = {
            key: getattr(config, key)
            for key in ("id2label", "label2id", "problem_type")
            if hasattr(config, key)
        }
        self.vocabulary = getattr(_text(config), "vocab_size", None)
        self.padding = getattr(_text(config), "pad_token_id", None)
        self._padded = {
            name: module.padding_idx
            for name, module in model.named_modules(remove_duplicate=False)
            if isinstance(module, (nn.Embedding, nn.EmbeddingBag))
            and module.padding_idx is not None
        }
        self.sides = {
            name: tuple(parameter.shape)
            for name, parameter in model.named_parameters(remove_duplicate=False)
        }
        self._tied: dict[str, list[str]] = {}
        for name, first in tied_names(model).items():
            self._tied.setdefault(first, [first]).append(name)
        self.counting = {
            attribute: [n for n, m in model.named_modules() if attribute in vars(m)]
            for attribute in ("num_labels", "vocab_size")
        }

    def settings(self, model: nn.Module, name: str, shape: Shape) -> list[Setting]:
        """Settings that follow where a tensor is of a shape, under every name that it has."""
        found: list[Setting] = []
        for one in self._tied.get(name, (name,)):
            owner, _, leaf = one.rpartition(".")
            module = model.get_submodule(owner)
            if leaf == "weight":
                found += [(module, key, value) for key, value in _sides(module, shape)]
                if (padding := self._padded.get(owner)) is not None:
                    found.append((module, "padding_idx", _within(padding, shape)))
                found += self._of_labels(model, module, one, shape)
                found += self._of_vocabulary(model, module, one, shape)
        return found

    def follow(self, model: nn.Module, name: str, shape: Shape) -> None:
        """Set what follows for good."""
        for thing, key, value in self.settings(model, name, shape):
            setattr(thing, key, value)

    @contextmanager
    def following(
        self, model: nn.Module, shapes: Mapping[str, Shape]
    ) -> Iterator[None]:
        """Set what follows for a while; also what a forward finds out about the labels is forgotten."""
        undo: list[Setting] = []
        config = getattr(model, "config", None)
        if "problem_type" in self.names:
            undo.append((config, "problem_type", config.problem_type))
        try:
            for name, shape in shapes.items():
                for thing, key, value in self.settings(model, name, shape):
                    undo.append((thing, key, getattr(thing, key)))
                    setattr(thing, key, value)
            yield
        finally:
            for thing, key, value in reversed(undo):
                setattr(thing, key, value)

    def _of_labels(
        self, model: nn.Module, module: nn.Module, name: str, shape: Shape
    ) -> list[Setting]:
        """Settings of a last layer with as many outputs as the model has labels, or one more, for no object."""
        inner = getattr(model, "base_model_prefix", None)
        if self.labels is None or not isinstance(module, (nn.Linear, _ConvNd)):
            return []
        beside = self.sides.get(name, (-1,))[0] - self.labels
        heads = (0, 1) if type(model).__name__.endswith(_OF_OBJECTS) else (0,)
        if beside not in heads or (inner and name.startswith(f"{inner}.")):
            return []
        config, count = model.config, shape[0] - beside
        names = dict(self.names)
        if count != self.labels:
            names["id2label"] = {i: f"LABEL_{i}" for i in range(count)}
            names["label2id"] = {label: i for i, label in names["id2label"].items()}
            if names.get("problem_type") != "multi_label_classification":
                names["problem_type"] = None  # found out from the labels
        found = [(config, key, value) for key, value in names.items()]
        return found + self._counts(model, "num_labels", count)

    def _of_vocabulary(
        self, model: nn.Module, module: nn.Module, name: str, shape: Shape
    ) -> list[Setting]:
        """Settings of a language model's first and last layer."""
        if self.vocabulary is None or self.sides.get(name, (0,))[0] != self.vocabulary:
            return []
        if not any(module is end for end in ends_of(model)):
            return []
        config = _text(model.config)
        found = [(config, "vocab_size", shape[0])]
        if self.padding is not None:
            found.append((config, "pad_token_id", _within(self.padding, shape)))
        return found + self._counts(model, "vocab_size", shape[0])

    def _counts(self, model: nn.Module, attribute: str, count: int) -> list[Setting]:
        names = self.counting[attribute]
        return [(model.get_submodule(name), attribute, count) for name in names]


def ends_of(model: nn.Module) -> list[nn.Module]:
    """First and last layer of a language model, as far as it has them; the last of one that writes what it hears."""
    found = [getattr(model, "lm_head", None)]
    for end in ("input", "output"):
        try:
            found.append(getattr(model, f"get_{end}_embeddings")())
        except (AttributeError, NotImplementedError):
            pass
    return [layer for layer in found if layer is not None]


def _text(config: Any) -> Any:
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _within(row: int, shape: Shape) -> int | None:
    """The row of a table; None where the table does not hold it."""
    return row if row < shape[0] else None


#: What kinds of modules call the sides of their weight.
_SIDES = {
    nn.Linear: ("out_features", "in_features"),
    nn.Bilinear: ("out_features", "in1_features", "in2_features"),
    nn.Embedding: ("num_embeddings", "embedding_dim"),
    nn.EmbeddingBag: ("num_embeddings", "embedding_dim"),
    _NormBase: ("num_features",),
    nn.GroupNorm: ("num_channels",),
    nn.PReLU: ("num_parameters",),
}


def _sides(module: nn.Module, shape: Shape) -> Iterator[tuple[str, Any]]:
    """Attributes that a module keeps of the shape of its weight."""
    for kind, names in _SIDES.items():
        if isinstance(module, kind):
            yield from zip(names, shape)
            return
    if is_conv1d(module):
        yield from zip(("nx", "nf"), shape)
    elif isinstance(module, _ConvNd):
        outer, inner = "out_channels", "in_channels"
        if module.transposed:
            outer, inner = inner, outer
        yield outer, shape[0]
        yield inner, shape[1] * module.groups
        yield "kernel_size", shape[2:]
    elif isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
        yield "normalized_shape", shape
