"""Texts or images classified, each by its own task, in one batch."""

import base64
import inspect
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import CheckpointMismatchError, SettingsError, some
from ..models import DynamicModel
from ..models.task_settings import known_tokens, labels_of, problem_of
from ..pools.carried import MULTI_LABEL, PADDING, REGRESSION
from ..pools.task_settings import CONFIGURATION
from .batching import Row
from .limits import Limits, Refused
from .tasks import answered, by_key, check_tokens, tasks_of

#: Formats of images that are read.
FORMATS = ("PNG", "JPEG", "WEBP")
#: By which processors are tried.
_ANY_IMAGE = Image.new("RGB", (48, 40))
#: Argument of image processors, the order of an image's sides.
_LAYOUT = "input_data_format"


@dataclass(frozen=True)
class Heads:
    """Classes of every task as directions of the model's pooled output, for towers without heads.

    Args:
        directions: by task (classes, width).
        labels: by task.
    """

    directions: Mapping[str, Tensor]
    labels: Mapping[str, list[str]]

    @classmethod
    def read(cls, file: str | Path, tasks: Sequence[str], width: int) -> "Heads":
        """From safetensors: a tensor (classes, width) per task; its metadata ``labels`` is JSON, names of the classes by task.

        Args:
            width: of the model's vectors.

        Raises:
            CheckpointMismatchError: if it cannot be read, a task or the name of a class is missing, or directions are of another
                width.
        """
        expected = f"expected a tensor (classes, {width}) per task, and in the metadata labels={{task: [names]}} as JSON"
        try:
            with safe_open(file, "pt") as held:
                found = {t: held.get_tensor(t) for t in tasks if t in held.keys()}
                labels = json.loads((held.metadata() or {}).get("labels", "{}"))
            if not isinstance(labels, Mapping):
                raise ValueError("labels is no object")
        except (SafetensorError, OSError, ValueError) as error:
            raise CheckpointMismatchError(
                f"{file} cannot be read ({error}); {expected}."
            ) from error
        for task in tasks:
            shape = tuple(found[task].shape) if task in found else None
            names = labels.get(task)
            count = len(names) if isinstance(names, list) else 0
            if shape != (count, width):
                raise CheckpointMismatchError(
                    f"{file} has {shape or 'no tensor'} for {task!r} and names {count} classes of it; {expected}."
                )
        return cls(found, {task: list(map(str, labels[task])) for task in tasks})


class Classification:
    """A merged classifier of texts or images, or a merged tower with heads.

    Args:
        model: on its device.
        processors: tokenizers, or image processors, by task, the base model's by None.
        images: what it is given.
        limits: of inputs.
        heads: None where the model has its own.

    Raises:
        SettingsError: for a router that mixes tasks whose heads are of other shapes, tokenizers that cannot pad, and image
            processors whose images the model does not take.
    """

    def __init__(
        self,
        model: DynamicModel,
        processors: Mapping[str | None, Any],
        *,
        images: bool,
        limits: Limits,
        heads: Heads | None = None,
    ):
        self.model, self.processors, self.limits = model, processors, limits
        self.images, self.heads = images, heads
        if model.router is not None and not model.router.hard and self.apart:
            raise SettingsError(
                "The router mixes tasks (hard=false), whose heads are of other shapes. Attach one with hard=true to the model that "
                "is served."
            )
        self.known = known_tokens(model)
        #: Tokens that pad texts here and are words to the checkpoints, by task.
        self.padding: dict[str | None, int] = {}
        if images:
            self._check_sizes()
        else:
            self.padding = _let_pad(model, processors, self.known)

    def _check_sizes(self) -> None:
        """What each processor makes of an image is one that the model takes.

        Raises:
            SettingsError: for a task's that is not.
        """
        tried = set[int]()
        for task, processor in self.processors.items():
            if id(processor) in tried:
                continue
            tried.add(id(processor))
            try:
                pixels = _processed(processor, _ANY_IMAGE)["pixel_values"]
                self([Row(task or self.model.tasks[0], pixels[0])])
            except (ValueError, TypeError, RuntimeError) as error:
                raise SettingsError(
                    f"What the image processor of {task or 'the base model'} makes of an image is none that the model takes ({error}). "
                    "Mend the preprocessor_config.json beside its checkpoint."
                ) from error

    def row(self, task: str | None, content: str) -> Row:
        """One text, or one image in base64.

        Raises:
            Refused: 400 for what cannot be read or is too long.
        """
        if self.images:
            return Row(task, self._pixels(task, content))
        tokenizer = self.processors[task]
        encoded = tokenizer(content, verbose=False)
        most = self.limits.prompt_tokens
        places = getattr(self.model.backbone.config, "max_position_embeddings", most)
        # some models count positions from a later one, which only the tokenizer knows
        most = min(most, places, tokenizer.model_max_length)
        count = len(encoded["input_ids"])
        if not 0 < count <= most:
            raise Refused(400, f"A text is of {count} tokens, expected 1 to {most}.")
        check_tokens(tokenizer, encoded["input_ids"], self.known[task])
        if encoded["input_ids"][-1] == self.padding.get(task):
            raise Refused(400, f"A text ends in {tokenizer.pad_token!r}, which is what pads texts here; leave it out.")  # fmt: skip
        return Row(task, dict(encoded))

    def _pixels(self, task: str | None, content: str) -> Tensor:
        processor = self.processors[task]
        try:
            data = base64.b64decode(content, validate=True)
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                if _as_resized(processor, *image.size) > self.limits.pixels:
                    raise Refused(
                        400,
                        f"An image is of {image.width} x {image.height} pixels, at most {self.limits.pixels} are read, also once it "
                        "is resized.",
                    )
                pixels = image.convert("RGB")
        except Refused:
            raise
        # the last one: of parts of a PNG
        except (ValueError, OSError, Image.DecompressionBombError, SyntaxError):
            raise Refused(
                400,
                f"An image cannot be read: expected base64 of {', '.join(FORMATS)}.",
            ) from None
        return _processed(processor, pixels)["pixel_values"][0]

    @torch.inference_mode()
    def __call__(self, rows: Sequence[Row]) -> list[dict[str, float]]:
        """Probabilities by label, largest first; values as they are of tasks of regression."""
        return answered(self.model, rows, self._by_kind)

    def _by_kind(self, rows: Sequence[Row]) -> list[dict[str, float]]:
        """Images of one size, and texts of one tokenizer, are one batch."""
        kinds = [
            row.content.shape if self.images else id(self.processors[row.task])
            for row in rows
        ]
        return by_key(rows, kinds, lambda some, _: self._classified(some))

    def _classified(self, rows: Sequence[Row]) -> list[dict[str, float]]:
        first = next(self.model.backbone.parameters())
        contents = [row.content for row in rows]
        if self.images:
            pixels = torch.stack(contents)
            inputs = {"pixel_values": pixels.to(first.device, first.dtype)}
        else:
            tokenizer = self.processors[rows[0].task]
            inputs = tokenizer.pad(contents, return_tensors="pt").to(first.device)
        asked = tasks_of(self.model, rows, inputs)
        tasks = asked.get("task_ids")
        if tasks is None:
            tasks = self._found(asked["task_weights"])
        if not self.apart:
            found = self._rows(self.model(**inputs, **asked))
            return list(map(self._told, found, tasks))

        def run(places: list[int], task: str | None) -> list[dict[str, float]]:
            some = {name: value[places] for name, value in inputs.items()}
            output = self.model(**some, task_ids=[task] * len(places))
            return [self._told(row, task) for row in self._rows(output)]

        return by_key(range(len(rows)), tasks, run)

    def _found(self, weights: Tensor) -> list[str | None]:
        """The likeliest tasks; None where the router finds none.

        Raises:
            Refused: 400, where classes are a task's own then.
        """
        places = torch.where((weights == 0).all(1), -1, weights.argmax(1)).tolist()
        if self.heads is not None and -1 in places:
            raise Refused(
                400, "The router found no task for an input, whose classes are not known then. Name its model."  # fmt: skip
            )
        return [None if place < 0 else self.model.tasks[place] for place in places]

    @cached_property
    def apart(self) -> bool:
        """Whether tasks have heads of their own shapes, whose outputs are not one batch."""
        shapes = {n: p.shape for n, p in self.model.backbone.named_parameters()}
        experts = self.model.modulators.values()
        deltas = (pair for expert in experts for pair in expert.deltas.items())
        return any(name in shapes and d.shape != shapes[name] for name, d in deltas)

    def _rows(self, output: Any) -> Tensor:
        return output.logits if self.heads is None else _vectors(output)

    def _told(self, row: Tensor, task: str | None) -> dict[str, float]:
        """The answer to one row of outputs."""
        info, config = self.model.info, self.model.backbone.config
        if self.heads is not None:
            directions = self.heads.directions[task].to(row.device).float()
            shares = (directions @ row.float()).softmax(0)
            return _sorted(shares, self.heads.labels[task])
        names = labels_of(info, task) or config.id2label
        if len(names) != len(row):  # the base model's head is another one
            names = {i: f"LABEL_{i}" for i in range(len(row))}
        scores = _scores(row.float(), problem_of(info, task, config, len(row)))
        return _sorted(scores, [names[i] for i in range(len(row))])


def _processed(processor: Any, image: Image.Image) -> Any:
    """A processor's answer; it is told which side is of the colors, which it would take one of 1 or 3 pixels for."""
    takes = inspect.signature(processor.preprocess).parameters.values()
    if not any(p.name == _LAYOUT or p.kind is p.VAR_KEYWORD for p in takes):
        return processor(image, return_tensors="pt")  # timm's, of no layout
    told = {_LAYOUT: "channels_last", "return_tensors": "pt"}
    return processor(np.array(image), **told)


def _as_resized(processor: Any, width: int, height: int) -> float:
    """Pixels of an image as sent, or as a processor makes it by its shorter side, whichever are more."""
    size = getattr(processor, "size", None) or {}
    edge = size.get("shortest_edge") if hasattr(size, "get") else None
    longer, shorter = max(width, height), max(min(width, height), 1)
    return max(width * height, (edge or 0) ** 2 * longer / shorter)


def _let_pad(
    model: DynamicModel,
    tokenizers: Mapping[str | None, Any],
    known: Mapping[str | None, float],
) -> dict[str | None, int]:
    """Texts of several lengths are one batch: the model is told what pads those of each task, by which some find the last token,
    whatever padded those that it was fine-tuned on.

    Args:
        known: how many tokens the model knows, by task.

    Returns:
        what pads texts of tasks whose checkpoints are padded by another token, or by none.

    Raises:
        SettingsError: if a tokenizer has no such token that the model knows, or ends every text in it where its checkpoint is padded
            by another.
    """
    pads = {task: tokenizer.pad_token_id for task, tokenizer in tokenizers.items()}
    without = [task for task, pad in pads.items() if pad is None or pad >= known[task]]
    if without:
        whose = some(task or "the base model" for task in without)
        raise SettingsError(
            f"The tokenizer of {whose} has no pad_token that the model knows, so that texts of several lengths are no batch. Name one "
            "in the tokenizer_config.json beside it."
        )
    usual, config = next(iter(pads.values())), model.backbone.config
    before = getattr(config, PADDING, None)
    config.pad_token_id = usual
    told = model.info.setdefault(CONFIGURATION, {})
    others = {None: pads[None]} if None in pads and pads[None] != before else {}
    for task in model.tasks:
        own = told.setdefault(task, {})
        if own.pop(PADDING, before) != pads[task]:
            others[task] = pads[task]
        if pads[task] != usual:
            own[PADDING] = pads[task]
    for task, pad in others.items():
        if tokenizers[task]("a")["input_ids"][-1:] == [pad]:
            raise SettingsError(
                f"The tokenizer of {task or 'the base model'} ends every text in {tokenizers[task].pad_token!r}, which also pads texts, "
                "and its model's configuration does not say so (pad_token_id). Name another pad_token in its tokenizer_config.json."
            )
    return others


def _vectors(output: Any) -> Tensor:
    """The vector of each image, projected where the tower projects."""
    projected = getattr(output, "image_embeds", None)
    return output.pooler_output if projected is None else projected


def _scores(logits: Tensor, problem: str | None) -> Tensor:
    """Logits as the text classification of ``transformers`` answers with them."""
    if problem == REGRESSION:
        return logits
    if problem == MULTI_LABEL or len(logits) == 1:
        return logits.sigmoid()
    return logits.softmax(0)


def _sorted(scores: Tensor, labels: Sequence[str]) -> dict[str, float]:
    pairs = sorted(zip(scores.tolist(), labels), key=lambda pair: -pair[0])
    return {label: score for score, label in pairs}
