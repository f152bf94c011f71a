"""The demo's CLIP: a small vision tower and a text tower that knows its words exactly.

The host classifies zero-shot through ``text_model`` and ``text_projection``, so the text
tower has to be a real one; but with some hundred class names there is nothing to learn
about language. Each class name is therefore one token of its own, and the tower has no
layers: it must hand the token's embedding ``e`` (d,) on, untouched, through what CLIP
always does. Three choices see to that:

- the tower's width is 2d and the token is stored as ``[e, -e]``, whose mean is zero, so
  that the final layer norm only rescales it; the projection ``[I, 0]`` gives ``e`` back;
- position embeddings are zero;
- class tokens have the highest ids. With ``eos_token_id == 2`` CLIP pools the highest id
  of a text (the original models' rule), which is the class name wherever it stands.
"""

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Sequence

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    CLIPTokenizer,
    CLIPVisionConfig,
)

from ..task_vectors.tower_names import PREFIX
from .drawing import SIDE

_MEAN_AND_STD = [0.5, 0.5, 0.5]


def make_clip(*, width: int, layers: int, words: int, seed: int) -> CLIPModel:
    """An untrained CLIP for ``words`` tokens; the same weights for the same seed."""
    config = CLIPConfig(
        vision_config=dict(
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=layers,
            num_attention_heads=max(1, width // 32),
            image_size=SIDE,
            patch_size=8,
        ),
        text_config=dict(
            vocab_size=words,
            hidden_size=2 * width,
            intermediate_size=4,  # of no layer; zero is refused by some versions
            num_hidden_layers=0,
            num_attention_heads=1,
            max_position_embeddings=64,
            bos_token_id=0,
            eos_token_id=2,  # "the highest id of the text", see above
            pad_token_id=1,
        ),
        projection_dim=width,
        logit_scale_init_value=3.0,  # a temperature of 1/20
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return CLIPModel(config).eval()


def make_processor(classnames: Sequence[str]) -> CLIPProcessor:
    """Bytes, so that any text can be read, and after them one token per class name."""
    with TemporaryDirectory() as folder:
        blank = Path(folder)
        letters = _byte_letters()
        words = ["<|startoftext|>", "<|endoftext|>"]
        words += letters + [f"{letter}</w>" for letter in letters]
        vocabulary = {word: index for index, word in enumerate(words)}
        (blank / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
        (blank / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
        tokenizer = CLIPTokenizer(
            str(blank / "vocab.json"), str(blank / "merges.txt"), model_max_length=64
        )
    tokenizer.add_tokens(list(classnames))
    images = CLIPImageProcessor(
        size={"shortest_edge": SIDE},
        crop_size={"height": SIDE, "width": SIDE},
        image_mean=_MEAN_AND_STD,
        image_std=_MEAN_AND_STD,
    )
    return CLIPProcessor(images, tokenizer)


def _byte_letters() -> list[str]:
    """A printable letter for each byte, as byte-level vocabularies write them."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in printable]
    return [chr(b) for b in printable] + [chr(256 + n) for n in range(len(hidden))]


@torch.no_grad()
def set_class_embeddings(clip: CLIPModel, first_id: int, embeddings: Tensor) -> None:
    """Make the text tower say ``embeddings`` (classes, d) for the tokens from ``first_id``."""
    text, width = clip.text_model, embeddings.shape[1]
    unit = torch.nn.functional.normalize(embeddings, dim=-1) * width**0.5  # variance 1
    table = text.embeddings.token_embedding.weight
    table[first_id : first_id + len(unit)] = torch.cat([unit, -unit], dim=1)
    text.embeddings.position_embedding.weight.zero_()
    text.final_layer_norm.weight.fill_(1.0)
    text.final_layer_norm.bias.zero_()
    clip.text_projection.weight.zero_()
    clip.text_projection.weight[:, :width] = torch.eye(width)


def pixel_values(images: Tensor) -> Tensor:
    """What the processor makes of 32 px pictures (n, 32, 32, 3) uint8: (n, 3, 32, 32)."""
    return images.permute(0, 3, 1, 2).float() / 127.5 - 1.0


def save_vision_tower(clip: CLIPModel, folder: Path) -> None:
    """Write the vision tower as ``CLIPVisionModel`` does under transformers 4.

    Its keys carry ``vision_model.``, as those of every CLIP checkpoint on the hub do;
    version 5 reads that as well, but would itself write keys that version 4 silently
    ignores. A ``CLIPModel`` carries the prefix under both, hence the tensors come from one.
    """
    folder.mkdir(parents=True)
    tensors = {
        key: tensor.contiguous()
        for key, tensor in clip.state_dict().items()
        if key.startswith(PREFIX)
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = CLIPVisionConfig.from_dict(clip.config.vision_config.to_dict())
    config.architectures = ["CLIPVisionModel"]
    config.save_pretrained(folder)
