"""A language model that sees, hears and feels: one Qwen2 shared by three modalities, with an encoder and a projector of each.

Pictures go through CLIP's tower and LLaVA's way of projecting it, spectrograms through the encoder and the projector of
Qwen2-Audio, readings of a synthetic sensor through convolutions. What is said of an input is a sentence of which every word
can be right or wrong. All of it is drawn on the spot, from a seed.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    Qwen2AudioEncoderConfig,
    Qwen2Config,
    Qwen2ForCausalLM,
)
from transformers.models.qwen2_audio.modeling_qwen2_audio import Qwen2AudioEncoder

WIDTH, SEEN = 128, 64
SIDE, BINS, FRAMES, CHANNELS, READINGS = 32, 32, 64, 3, 64

COLORS = {
    "red": (1.0, 0.2, 0.2),
    "green": (0.2, 0.9, 0.3),
    "blue": (0.2, 0.3, 1.0),
    "yellow": (0.9, 0.9, 0.2),
}
PLACES = {"left": (16, 8), "right": (16, 24), "top": (8, 16), "bottom": (24, 16)}


@dataclass(frozen=True)
class Modality:
    """What can be said of its inputs.

    Args:
        said: a sentence with a ``{}`` per attribute.
        choices: words of each attribute.
    """

    said: str
    choices: tuple[tuple[str, ...], ...]

    def sentence(self, picks: list[int]) -> list[str]:
        words = (c[i] for c, i in zip(self.choices, picks, strict=True))
        return self.said.format(*words).split()

    @cached_property
    def places(self) -> list[int]:
        """Where in the sentence the attributes stand."""
        return [i for i, word in enumerate(self.said.split()) if word == "{}"]


MODALITIES = {
    "image": Modality(
        "a {} {} {} at the {} of the picture",
        (("small", "large"), tuple(COLORS), ("circle", "square", "cross", "stripe"), tuple(PLACES)),
    ),
    "audio": Modality(
        "a {} {} tone with {} sound that is {}",
        (("quiet", "loud"), ("low", "middle", "high"), ("pure", "rough"), ("steady", "rising", "falling", "broken")),
    ),
    "sensor": Modality(
        "{} motion along the {} axis that is {} with a shock {}",
        (("slow", "quick"), ("first", "second", "third"), ("regular", "noisy", "fading"), ("early", "late", "never")),
    ),
}  # fmt: skip
WORDS = ["<pad>", "<start>", "<end>"] + sorted(
    {
        word
        for m in MODALITIES.values()
        for word in (
            *m.said.replace("{}", "").split(),
            *(w for c in m.choices for w in c),
        )
    }
)
PAD, START, END = range(3)
TOKEN = {word: i for i, word in enumerate(WORDS)}


class Projector(nn.Module):
    """LLaVA's: two layers from what an encoder sees to what a language model reads."""

    def __init__(self, width: int):
        super().__init__()
        self.linear_1, self.linear_2 = nn.Linear(width, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, features: Tensor) -> Tensor:
        return self.linear_2(nn.functional.gelu(self.linear_1(features)))


class SensorEncoder(nn.Module):
    """(B, channels, readings) to (B, readings / 8, width)."""

    def __init__(self):
        super().__init__()
        sides = [CHANNELS, 32, SEEN, SEEN]
        self.layers = nn.ModuleList(
            nn.Conv1d(i, o, 5, stride=2, padding=2) for i, o in zip(sides, sides[1:])
        )

    def forward(self, signal: Tensor) -> Tensor:
        for layer in self.layers:
            signal = nn.functional.gelu(layer(signal))
        return signal.transpose(1, 2)


class MultimodalModel(nn.Module):
    """The language model with an encoder and a projector per modality; those that no training touched do nothing."""

    def __init__(self):
        super().__init__()
        self.language_model = Qwen2ForCausalLM(
            Qwen2Config(
                vocab_size=len(WORDS),
                hidden_size=WIDTH,
                intermediate_size=352,
                num_hidden_layers=4,
                num_attention_heads=4,
                num_key_value_heads=2,
                max_position_embeddings=64,
                bos_token_id=START,
                eos_token_id=END,
                pad_token_id=PAD,
            )
        )
        layers = {"num_hidden_layers": 2, "num_attention_heads": 4}
        sides = {"hidden_size": SEEN, "intermediate_size": 2 * SEEN}
        picture = {"image_size": SIDE, "patch_size": 8}
        image = CLIPVisionModel(CLIPVisionConfig(**layers, **sides, **picture))
        audio = Qwen2AudioEncoder(
            Qwen2AudioEncoderConfig(
                num_mel_bins=BINS,
                encoder_layers=2,
                encoder_attention_heads=4,
                encoder_ffn_dim=2 * SEEN,
                d_model=SEEN,
                max_source_positions=FRAMES // 2,
            )
        )
        encoders = {"image": image, "audio": audio, "sensor": SensorEncoder()}
        self.encoders = nn.ModuleDict(encoders)
        self.projectors = nn.ModuleDict({m: Projector(SEEN) for m in encoders})

    def seen(self, modality: str, inputs: Tensor) -> Tensor:
        """(B, positions, WIDTH): what stands before the text."""
        features = self.encoders[modality](inputs)
        if hasattr(features, "last_hidden_state"):
            features = features.last_hidden_state
        return self.projectors[modality](features)

    def _embedded(self, modality: str, inputs: Tensor, ids: Tensor) -> Tensor:
        text = self.language_model.get_input_embeddings()(ids)
        return torch.cat([self.seen(modality, inputs), text], 1)

    def forward(self, ids: Tensor, modality: str, inputs: Tensor) -> Tensor:
        """(B, L, words): logits of what follows each of ``ids`` (B, L)."""
        embeds = self._embedded(modality, inputs, ids)
        logits = self.language_model(inputs_embeds=embeds, use_cache=False).logits
        return logits[:, -ids.shape[1] :]

    def generate(self, modality: str, inputs: Tensor, longest: int = 14) -> Tensor:
        """(B, at most longest): what the model says, word by word."""
        start = torch.full((len(inputs), 1), START, device=inputs.device)
        embeds = self._embedded(modality, inputs, start)
        mask = torch.ones(embeds.shape[:2], dtype=torch.long, device=inputs.device)
        return self.language_model.generate(
            inputs_embeds=embeds,
            attention_mask=mask,
            max_new_tokens=longest,
            do_sample=False,
        )


# --- what is said, and what it is said of -------------------------------------------


def sentences(modality: str, picks: Tensor) -> Tensor:
    """(B, L) of token ids, from start to end; one modality's are of one length."""
    chosen = MODALITIES[modality]
    rows = [
        [START, *(TOKEN[w] for w in chosen.sentence(p)), END] for p in picks.tolist()
    ]
    return torch.tensor(rows)


def draw(modality: str, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Inputs, and the (B, attributes) words by position that are true of them."""
    counts = [len(c) for c in MODALITIES[modality].choices]
    picks = [torch.randint(n, (count,), generator=generator) for n in counts]
    inputs = _DRAWN[modality](picks, generator)
    return inputs, torch.stack(picks, 1)


def _noise(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator)


def _pictures(picks: list[Tensor], generator: torch.Generator) -> Tensor:
    """(B, 3, SIDE, SIDE)"""
    size, color, shape, place = picks
    colors, places = torch.tensor([*COLORS.values()]), torch.tensor([*PLACES.values()])
    center = places[place] + 1.5 * _noise(generator, len(size), 2)
    radius = (3.0 + 3.0 * size)[:, None, None]
    grid = torch.arange(SIDE).float()
    y = grid[None, :, None] - center[:, 0, None, None]
    x = grid[None, None, :] - center[:, 1, None, None]
    inside = (y.abs() < radius) & (x.abs() < radius)
    drawn = torch.stack(
        [
            y.square() + x.square() < radius.square(),
            inside,
            inside & ((y.abs() < 1.5) | (x.abs() < 1.5)),
            inside & (((y + x) / 2).round().long() % 2 == 0),
        ],
        1,
    )
    mask = drawn[torch.arange(len(shape)), shape][:, None]
    background = 0.25 * _noise(generator, len(size), 3, SIDE, SIDE)
    return torch.where(mask, colors[color][:, :, None, None] + 0.5 * background, background)  # fmt: skip


def _spectrograms(picks: list[Tensor], generator: torch.Generator) -> Tensor:
    """(B, BINS, FRAMES): energy of tones that glide, with harmonics where they are rough."""
    loud, pitch, rough, course = picks
    count, time = len(loud), torch.linspace(0, 1, FRAMES)
    slope = torch.tensor([0.0, 7.0, -7.0, 0.0])[course][:, None] * (time - 0.5)
    middle = torch.tensor([6.0, 13.0, 21.0])[pitch] + _noise(generator, count)
    track = (middle[:, None] + slope)[:, None]  # (B, 1, FRAMES)
    bins = torch.arange(BINS).float()[None, :, None]

    def tone(at: Tensor) -> Tensor:
        return torch.exp(-0.5 * (bins - at).square())

    energy = tone(track) + 0.6 * rough[:, None, None] * (tone(track + 4) + tone(track - 4))  # fmt: skip
    broken = (course == 3)[:, None, None] & ((time * 8).long() % 2 == 1)[None, None]
    gain = (0.8 + 1.2 * loud)[:, None, None]
    return gain * energy * ~broken + 0.2 * _noise(generator, count, BINS, FRAMES)


def _signals(picks: list[Tensor], generator: torch.Generator) -> Tensor:
    """(B, CHANNELS, READINGS): an oscillation on one axis, and a shock on all."""
    quick, axis, kind, shock = picks
    count, time = len(quick), torch.linspace(0, 1, READINGS)
    turns = (3.0 + 5.0 * quick + 0.3 * _noise(generator, count))[:, None]
    phase = 6.28 * torch.rand(count, 1, generator=generator)
    wave = torch.sin(6.28 * turns * time + phase)
    wave = torch.where((kind == 2)[:, None], wave * torch.exp(-3 * time), wave)
    wave = wave + 0.6 * (kind == 1)[:, None] * _noise(generator, count, READINGS)
    signal = 0.15 * _noise(generator, count, CHANNELS, READINGS)
    signal[torch.arange(count), axis] += wave
    when = torch.tensor([0.2, 0.8, 9.0])[shock][:, None]
    return signal + 1.5 * torch.exp(-((time - when) / 0.03).square())[:, None]


_DRAWN = {"image": _pictures, "audio": _spectrograms, "sensor": _signals}


def words_right(said: Tensor, picks: Tensor, modality: str) -> float:
    """Share of the attributes that are named as they are, at their places in what was generated.

    Args:
        said: (B, L) without the start.
        picks: (B, attributes)
    """
    wanted = sentences(modality, picks)[:, 1:]
    places = MODALITIES[modality].places
    longest = max(places) + 1
    padded = nn.functional.pad(said, (0, max(0, longest - said.shape[1])), value=PAD)
    return (padded[:, places] == wanted[:, places]).float().mean().item()


def size_of(tensors: Mapping[str, Tensor], *starts: str) -> int:
    """Bytes of the tensors whose names begin so."""
    return sum(t.nbytes for n, t in tensors.items() if n.startswith(starts))
