"""One way for a matrix: read at most three times, looked at once, encoded by the form that was chosen."""

import threading
from collections import Counter
from dataclasses import dataclass

import pytest
import torch
from helpers import BASE, didi, floats, merge_settings, same_bits, without_codes
from test_golden import alike, clip, decaying, layers, within_spaces
from torch import Tensor

from fusion_bench_didi.allocation.curves import PerTaskCurve
from fusion_bench_didi.checkpoint import stream
from fusion_bench_didi.checkpoint.deltas import read_config
from fusion_bench_didi.checkpoint.stream import DeltaWriter
from fusion_bench_didi.deltas.base import Delta
from fusion_bench_didi.deltas.sink import EncodedTensor
from fusion_bench_didi.lowrank.row_blocks import materialize
from fusion_bench_didi.merging.forms import Choice, choice
from fusion_bench_didi.merging.pipeline import merge
from fusion_bench_didi.method import TallMaskMerging, TSVCompression
from fusion_bench_didi.task_vectors import digests
from fusion_bench_didi.task_vectors.reader import TaskVectors
from fusion_bench_didi.task_vectors.sources import ModuleSource


class Counting(ModuleSource):
    """A live module that counts how often each tensor is read."""

    def __init__(self, module, label: str):
        super().__init__(module, label)
        self.reads: Counter[str] = Counter()
        self._lock = threading.Lock()

    def read(self, name: str) -> Tensor:
        with self._lock:
            self.reads[name] += 1
        return super().read(name)


def counted(models) -> tuple[TaskVectors, list[Counting]]:
    sources = {name: Counting(model, name) for name, model in models.items()}
    vectors = TaskVectors(
        sources[BASE], {n: s for n, s in sources.items() if n != BASE}
    )
    return vectors, list(sources.values())


def mixed(m: int, n: int, g: torch.Generator) -> Tensor:
    """Partly the same for all tasks, partly of low rank."""
    same = torch.Generator().manual_seed(m)
    up, down = torch.randn(m, 4, generator=g), torch.randn(4, n, generator=g)
    return decaying(m, n, same) + 3 * up @ down + 0.3 * decaying(m, n, g)


@pytest.mark.parametrize(
    "budget, dtype",
    [(0.03, "auto"), (0.12, "float32"), (0.5, "auto"), (1.4, "float32"), (1.4, "auto")],
)
@pytest.mark.parametrize(
    "models",
    [
        clip,
        alike,
        lambda: layers(decaying),
        lambda: layers(within_spaces),
        lambda: layers(mixed),
    ],
    ids=["clip", "alike", "decaying", "within spaces", "mixed"],
)
def test_each_tensor_is_read_at_most_three_times(models, budget, dtype):
    vectors, sources = counted(models())
    merge(vectors, merge_settings(budget, factor_dtype=dtype, vectors="pretrained"))
    assert max(max(source.reads.values()) for source in sources) <= 3


def test_nothing_is_read_twice_for_a_matrix_that_is_known_to_be_dense(monkeypatch):
    without_codes(monkeypatch)
    vectors, sources = counted(layers(decaying))
    result = merge(vectors, merge_settings(0.5, factor_dtype="auto"))
    assert set(result.report.forms.values()) == {"experts"}
    assert all(set(source.reads.values()) == {2} for source in sources)


# --- a new form is one file and one line ---------------------------------------------


class SignDelta(Delta):
    """The sign of every entry times a scale per row, for the test: not packed."""

    kind = "sign_of_a_test"
    parts = ("sign", "scale")

    def __init__(self, shape, sign, scale):
        super().__init__(shape, sign=sign, scale=scale)

    def own(self) -> Tensor:
        return (self.sign.float().flatten(1) * self.scale[:, None]).view(self.shape)


@dataclass(frozen=True)
class OneBit:
    """One bit per entry and a scale per row, for every task that is worth it."""

    name: str = "one_bit"

    def choices(self, look):
        m, n = look.sides
        # what one bit leaves of a Gaussian: 1 - 2 / pi
        lost = torch.stack([look.energy, 0.363 * look.energy], 1)
        bits = torch.tensor([0.0, m * n + 32 * m], dtype=torch.float64)
        curve = PerTaskCurve(look.weights.double()[:, None] * lost, bits)
        precision = look.context.inventory.cheapest(look.name)
        yield Choice(self, precision, curve)

    def encode(self, context, decision) -> EncodedTensor:
        tensor, experts, errors = context.tensor(decision.name), [], []
        for one, kept in zip(tensor.differences(), decision.point):
            tau = materialize(one)
            scale = tau.abs().mean(1)
            delta = SignDelta(tensor.shape, tau.sign().char().view(tensor.shape), scale)
            experts.append(delta if kept else None)
            rest = tau - delta.own().flatten(1) if kept else tau
            errors.append(rest.double().square().sum())
        return EncodedTensor(decision.name, None, experts, torch.stack(errors))

    def ranks(self, decision, tasks: int) -> list[int]:
        return [0, *map(int, decision.point)]


def test_a_new_form_competes_with_the_others(monkeypatch):
    """At less than two bits per entry, one bit is what a flat spectrum is best stored in."""

    def flat(m: int, n: int, g: torch.Generator) -> Tensor:
        return torch.randn(m, n, generator=g)

    without_codes(monkeypatch)
    models, settings = layers(flat), merge_settings(0.12, factor_dtype="auto")
    without = merge(counted(models)[0], settings)
    monkeypatch.setattr(choice, "FORMS", (*choice.FORMS, OneBit()))
    found = merge(counted(models)[0], settings)
    assert set(found.report.forms.values()) == {"one_bit"}
    assert found.report.relative_error < without.report.relative_error
    assert found.report.relative_error == pytest.approx(0.363, abs=0.01)
    for name in vars(models[BASE])["_modules"]:
        assert found.ranks.experts["a"][f"{name}.weight"] == 1


# --- the one unit, into memory and into files ------------------------------------------


@pytest.mark.parametrize("method", [TSVCompression, TallMaskMerging])
def test_baselines_stream_like_didi(tmp_path, method):
    held = method().run(clip())
    written = method(output_dir=str(tmp_path / "out")).run(clip())
    again = type(held).from_pretrained(tmp_path / "out", clip()[BASE])
    assert written.storage == held.storage == again.storage
    for task in held.tasks:
        for model in (written, again):
            assert same_bits(
                floats(held.materialize(task)), floats(model.materialize(task))
            )


def test_a_merge_that_fails_leaves_no_writer_at_work(tmp_path, monkeypatch):
    """The directory goes away with the error; no thread may still be writing into it."""
    writing, save = [], stream.save_file

    def slow(tensors, file, **options):
        writing.append("begun")
        threading.Event().wait(0.2)
        save(tensors, file, **options)
        writing.append("ended")

    monkeypatch.setattr(stream, "save_file", slow)
    monkeypatch.setattr(stream, "SHARD_BYTES", 2**12)
    put, count = DeltaWriter.put, []

    def failing(self, tensor):
        put(self, tensor)
        count.append(tensor.name)
        if len(count) > 3 and "begun" in writing:
            raise RuntimeError("on the way")

    monkeypatch.setattr(DeltaWriter, "put", failing)
    with pytest.raises(RuntimeError, match="on the way"):
        didi(clip(), budget=0.6, output_dir=str(tmp_path / "out"))
    assert writing.count("begun") == writing.count("ended") > 0
    assert [p.name for p in tmp_path.iterdir()] == [".out.journal"]


def test_bytes_are_hashed_once(tmp_path, monkeypatch):
    hashed, digest = [], stream.file_digest

    def noted(file):
        hashed.append(file)
        return digest(file)

    monkeypatch.setattr(stream, "file_digest", noted)
    monkeypatch.setattr("fusion_bench_didi.checkpoint.tensors.file_digest", noted)
    didi(clip(), budget=0.6, output_dir=str(tmp_path / "out"))
    assert len(hashed) == len(set(hashed)) > 1


def test_checksums_of_the_base_model_are_taken_once(tmp_path, monkeypatch):
    """They tell this merge from another, and stand in the manifest: every tensor's, and no other than without a journal."""
    taken, digest = Counter(), digests._digest

    def noted(tensor):
        taken[tensor.data_ptr()] += 1
        return digest(tensor)

    model = didi(clip(), budget=0.6)
    model.save_pretrained(tmp_path / "afterwards")
    monkeypatch.setattr(digests, "_digest", noted)
    model = didi(clip(), budget=0.6, output_dir=str(tmp_path / "out"))
    tensors = dict(model.backbone.named_parameters())
    assert {taken[t.data_ptr()] for t in tensors.values()} == {1}
    written, expected = (
        read_config(tmp_path / name)["backbone"]["tensors"]
        for name in ("out", "afterwards")
    )
    assert written == expected and list(written) == list(expected)
