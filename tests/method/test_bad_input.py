"""What a user can get wrong, and the message that says so, before any decomposition."""

import math
import re
import struct

import pytest
import torch
from fusion_bench.modelpool import BaseModelPool, CLIPVisionModelPool
from helpers import BASE, TOWER, OpenClipLike, Payload, didi, family, task_vectors
from safetensors.torch import load_file, save_file
from torch import nn

import fusion_bench_didi.merging.pipeline as pipeline
from fusion_bench_didi.errors import (
    BudgetError,
    CheckpointMismatchError,
    DiDiError,
    ModelPoolError,
    NonFiniteError,
    UnknownTaskError,
)
from fusion_bench_didi.lowrank import svd
from fusion_bench_didi.method.baselines.delta_come import DeltaCoMe
from fusion_bench_didi.method.baselines.emr import EMRMerging
from fusion_bench_didi.method.didi import DiDiMerging

FIRST = f"{TOWER}encoder.layers.0.mlp.fc1.weight"
LAST = f"{TOWER}post_layernorm.bias"


@pytest.fixture
def no_svd(monkeypatch):
    """Any decomposition is an error, but of one number, by which an accelerator's library is loaded."""

    def refused(decompose):
        def call(matrix, *args, **kwargs):
            if matrix.numel() > 1:
                raise AssertionError("an SVD has run")
            return decompose(matrix, *args, **kwargs)

        return call

    for name in ("svd", "eigh", "qr"):
        decompose = getattr(svd.torch.linalg, name)
        monkeypatch.setattr(svd.torch.linalg, name, refused(decompose))


@pytest.fixture
def files(tiny_clip, tmp_path):
    """A pool of directories that a test may damage."""
    tiny_clip.save(tmp_path)
    names = (BASE, *tiny_clip.tasks)
    return CLIPVisionModelPool({name: str(tmp_path / name) for name in names})


def rewrite(pool, task, change) -> None:
    """Change the tensors of a file, by their names in memory."""
    file, prefix = f"{pool._models[task]}/model.safetensors", "vision_model."
    tensors = {TOWER + n.removeprefix(prefix): t for n, t in load_file(file).items()}
    change(tensors)
    tensors = {prefix + n.removeprefix(TOWER): t for n, t in tensors.items()}
    save_file(tensors, file, metadata={"format": "pt"})


def test_guard_against_decompositions_works(tiny_clip, no_svd):
    with pytest.raises(AssertionError, match="an SVD has run"):
        didi(tiny_clip.pool_models())


# --- the pool -----------------------------------------------------------------


def test_pool_without_base_model(tiny_clip):
    with pytest.raises(ModelPoolError, match="no '_pretrained_' among .*'mnist'"):
        didi(tiny_clip.tuned)


@pytest.mark.parametrize("count", [0, 1])
def test_pool_with_fewer_than_two_models(tiny_clip, count):
    models = dict(list(tiny_clip.pool_models().items())[: 1 + count])
    with pytest.raises(
        ModelPoolError, match=f"two fine-tuned models, the pool has {count}"
    ):
        didi(models)
    if not count:  # one alone may be fitted to what others share
        with pytest.raises(ModelPoolError, match="no fine-tuned model, expected one"):
            task_vectors(models)


@pytest.mark.parametrize(
    "twins", [("a-b", "a_b"), ("MNIST", "mnist"), ("glue-cola", "cola")]
)
def test_names_that_mean_the_same_task(tiny_clip, twins):
    tuned = list(tiny_clip.tuned.values())
    models = {BASE: tiny_clip.base, twins[0]: tuned[0], twins[1]: tuned[1]}
    expected = f"Duplicate task names: '{twins[0]}' and '{twins[1]}'"
    with pytest.raises(ModelPoolError, match=expected):
        didi(models)


def test_every_model_equals_the_base(tiny_clip, no_svd):
    models = {BASE: tiny_clip.base, "mnist": tiny_clip.base, "svhn": tiny_clip.base}
    with pytest.raises(ModelPoolError, match="All task vectors are zero: mnist, svhn"):
        didi(models)


def test_everything_is_excluded(tiny_clip):
    with pytest.raises(ModelPoolError, match="fewer patterns in exclude"):
        didi(tiny_clip.pool_models(), exclude=["*"])


def test_a_merge_that_stores_nothing_says_so(tiny_clip, caplog):
    with pytest.raises(BudgetError, match="nothing of any task fits"):
        DiDiMerging(budget=1e-6).run(tiny_clip.pool_models())
    DeltaCoMe(bits=0.01).run(tiny_clip.pool_models())
    assert "Nothing is stored for eurosat, mnist, svhn" in caplog.text


@pytest.mark.parametrize("method", [DiDiMerging, EMRMerging])
def test_a_model_that_is_the_base_itself_is_told(tiny_clip, caplog, method):
    models = {**tiny_clip.pool_models(), "svhn": tiny_clip.base}
    model = method().run(models)
    assert "No tensor of svhn differs from the base model" in caplog.text
    assert model.tasks == list(tiny_clip.tasks)
    caplog.clear()
    method(exclude=["*layers*"]).run(models)
    method().run(tiny_clip.pool_models())
    assert "No tensor of" not in caplog.text


# --- checkpoints that do not line up --------------------------------------------


def test_another_architecture(tiny_clip, no_svd):
    models = {**tiny_clip.pool_models(), "svhn": OpenClipLike()}
    with pytest.raises(CheckpointMismatchError) as caught:
        didi(models)
    message = str(caught.value)
    assert (
        f"svhn: 39 tensors missing: {TOWER}embeddings." in message
        and " more" in message
    )
    assert re.search(r"svhn: \d+ tensors that the base model .* attn\.", message)
    assert "mnist:" not in message


def test_no_model_of_the_bases_architecture(tiny_clip):
    models = {**family(OpenClipLike()), BASE: tiny_clip.base}
    with pytest.raises(
        CheckpointMismatchError, match="^mnist, svhn: no tensor is one of the base"
    ):
        didi(models)


@pytest.mark.parametrize("dry_run", [True, False])
def test_all_faults_of_all_files_come_in_one_error(files, no_svd, dry_run, monkeypatch):
    from fusion_bench_didi.task_vectors.file_sources import SafetensorsSource

    monkeypatch.setattr(SafetensorsSource, "read", lambda *_: 1 / 0)
    rewrite(files, "mnist", lambda t: t.pop(FIRST))
    rewrite(files, "svhn", lambda t: t.update({f"{TOWER}extra": torch.ones(2)}))

    def two_faults(tensors):
        tensors[FIRST] = torch.ones(3, 5)
        tensors[LAST] = torch.ones(32, dtype=torch.int64)

    rewrite(files, "eurosat", two_faults)
    with pytest.raises(CheckpointMismatchError) as caught:
        didi(files, dry_run=dry_run)
    message = str(caught.value)
    assert f"mnist: 1 tensors missing: {FIRST}" in message
    assert "svhn: 1 tensors that the base model does not have" in message
    assert f"{TOWER}extra" in message
    assert f"eurosat: {FIRST} is (3, 5), the base model has (64, 32)" in message
    assert (
        f"eurosat: {LAST} is of torch.int64, the base model has torch.float32"
        in message
    )
    assert "leave tensors out with exclude=[...]" in message


EXTRA = f"{TOWER}extra"
HELPLESS = {
    "missing": (FIRST, lambda t: t.pop(FIRST)),
    "extra": (EXTRA, lambda t: t.update({EXTRA: torch.ones(2)})),
    "kind": (LAST, lambda t: t.update({LAST: torch.ones(32, dtype=torch.int64)})),
}


@pytest.mark.parametrize("fault", HELPLESS)
def test_own_is_not_named_where_it_does_not_help(files, fault, no_svd, tmp_path):
    """Where it is asked for nevertheless that is told before the merge."""
    name, change = HELPLESS[fault]
    rewrite(files, "mnist", change)
    for own in ([], [name]):
        with pytest.raises(CheckpointMismatchError) as told:
            didi(files, own=own, output_dir=tmp_path / "out")
        message = str(told.value)
        assert "exclude=[...]" in message and "own=[...]" not in message
        said = f"The base model has no place for {EXTRA}, which own is to keep."
        assert (said in message) == (own == [EXTRA])
    assert not any(tmp_path.glob(".out*journal"))
    didi(files, exclude=[name], dry_run=True)


def test_own_is_named_where_shapes_differ(files):
    rewrite(files, "mnist", lambda t: t.update({LAST: torch.ones(5)}))
    with pytest.raises(
        CheckpointMismatchError, match=r"task has them with own=\[...\]"
    ):
        didi(files)
    didi(files, own=[LAST], dry_run=True)


def test_the_way_out_that_the_message_names_works(files):
    rewrite(files, "mnist", lambda t: t.pop(FIRST))
    rewrite(files, "svhn", lambda t: t.update({f"{TOWER}extra": torch.ones(2)}))
    rewrite(files, "eurosat", lambda t: t.update({LAST: torch.ones(5)}))
    model = didi(files, exclude=[FIRST, LAST, "*extra"])
    assert FIRST not in model.touched and LAST not in model.touched


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("live", [True, False])
def test_values_that_are_not_finite(files, tiny_clip, value, live, no_svd):
    if live:
        pool = tiny_clip.pool_models()
        with torch.no_grad():
            tiny_clip.tuned["svhn"].get_parameter(FIRST)[1, 2] = value
            tiny_clip.tuned["mnist"].get_parameter(LAST)[:3] = value
    else:
        pool = files
        rewrite(files, "svhn", lambda t: t[FIRST][1].__setitem__(2, value))
        rewrite(files, "mnist", lambda t: t[LAST][:3].fill_(value))
    with pytest.raises(NonFiniteError) as caught:
        didi(pool)
    message = str(caught.value)
    assert f"svhn: {FIRST} (1 entries)" in message
    assert f"mnist: {LAST} (3 entries)" in message
    assert "eurosat" not in message


def test_base_model_that_is_not_finite(tiny_clip, no_svd):
    with torch.no_grad():
        tiny_clip.base.get_parameter(LAST)[0] = math.nan
    with pytest.raises(NonFiniteError, match=f"the base model _pretrained_: {LAST}"):
        didi(tiny_clip.pool_models())


def test_tensor_that_is_not_finite_may_be_left_out(tiny_clip):
    with torch.no_grad():
        tiny_clip.tuned["svhn"].get_parameter(FIRST)[1, 2] = math.nan
    model = didi(tiny_clip.pool_models(), exclude=[FIRST])
    assert all(p.isfinite().all() for p in model.materialize("svhn").parameters())


@pytest.mark.parametrize("damage", ["truncated", "empty", "header", "garbage"])
@pytest.mark.parametrize("dry_run", [True, False])
def test_damaged_checkpoint_file(files, damage, dry_run, no_svd):
    from pathlib import Path

    file = Path(files._models["svhn"]) / "model.safetensors"
    content = file.read_bytes()
    damaged = {
        "truncated": content[: len(content) // 2],
        "empty": b"",
        "header": struct.pack("<Q", 2**50) + content[8:],
        "garbage": content[:8] + b"x" * 64 + content[72:],
    }
    file.write_bytes(damaged[damage])
    expected = r"svhn: .*svhn/model.safetensors is not a whole safetensors file"
    with pytest.raises(CheckpointMismatchError, match=expected):
        didi(files, dry_run=dry_run)


def test_pickle_that_is_more_than_weights(files, capsys):
    from pathlib import Path

    directory = Path(files._models["svhn"])
    (directory / "model.safetensors").unlink()
    torch.save({"weight": Payload()}, directory / "pytorch_model.bin")
    expected = "pytorch_model.bin cannot be read as a weights-only checkpoint"
    with pytest.raises(CheckpointMismatchError, match=expected):
        didi(files)
    assert "must not run" not in capsys.readouterr().out


# --- the budget -----------------------------------------------------------------


@pytest.mark.parametrize("value", [0, -1, -0.5, "0"])
def test_budget_that_is_not_positive(tiny_clip, value):
    with pytest.raises(BudgetError, match=r"leaves nothing to store: .* above 0, 1.4"):
        didi(tiny_clip.pool_models(), budget=value)


@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_budget_that_is_no_number(tiny_clip, value):
    with pytest.raises(BudgetError, match="is not a number"):
        didi(tiny_clip.pool_models(), budget=value)


@pytest.mark.parametrize("value", [0.5, 1.0])
def test_budget_that_the_backbone_takes_whole(tiny_clip, value):
    choice = {"budget": value, "budget_includes_backbone": True}
    with pytest.raises(BudgetError, match=r"counts the backbone .* which alone is 1"):
        didi(tiny_clip.pool_models(), **choice)


@pytest.mark.parametrize("vectors", ["expert", "shared"])
@pytest.mark.parametrize("include_backbone", [False, True])
@pytest.mark.parametrize("tasks", [2, 3])
def test_budget_too_small_names_the_smallest_that_works(
    tiny_clip, vectors, include_backbone, tasks, no_svd, monkeypatch
):
    models = dict(list(tiny_clip.pool_models().items())[: 1 + tasks])
    choice = {"budget_includes_backbone": include_backbone, "vectors": vectors}
    small = 0.001 + include_backbone
    with pytest.raises(BudgetError, match="too small: the vectors") as caught:
        didi(models, budget=small, **choice)
    named = re.search(r"alone take ([\d.]+)\. Give at least", str(caught.value))
    monkeypatch.undo()
    smallest = float(named[1])
    model = didi(models, budget=smallest, **choice)
    excl = model.storage.x_excl + include_backbone
    assert excl <= smallest <= excl + 2e-6
    with pytest.raises(BudgetError, match="too small"):
        didi(models, budget=smallest - 3e-6, **choice)


# --- choices and names ------------------------------------------------------------


@pytest.mark.parametrize(
    "choice, message",
    [
        ({"allocation": "best"}, r"allocation='best': Input should be 'learned',"),
        ({"refinement": "sgd"}, r"refinement='sgd': Input should be 'alternating',"),
        ({"residual": "x"}, r"residual='x': Input should be 'truncated' or 'full'"),
        ({"shared": "sum"}, r"shared='sum': Input should be 'auto',"),
        ({"vectors": "mean"}, r"vectors='mean': Input should be 'expert',"),
        ({"normalization": "x"}, r"normalization='x': Input should be 'none',"),
        ({"factor_dtype": "int5"}, "factor_dtype='int5'"),
    ],
    ids=str,
)
def test_option_that_does_not_exist(tiny_clip, choice, message, no_svd):
    """Found at once, not after an hour of decompositions."""
    with pytest.raises(ValueError, match=message):
        didi(tiny_clip.pool_models(), **choice)


def test_unknown_task(tiny_clip):
    model = didi(tiny_clip.pool_models())
    with pytest.raises(UnknownTaskError, match=r"'cars' is not in .*'mnist', 'svhn', "):
        model.set_task("cars")


def test_every_error_of_ours_is_a_value_error():
    """Callers of the host catch ValueError."""
    assert issubclass(DiDiError, ValueError)
    kinds = (BudgetError, CheckpointMismatchError, ModelPoolError, NonFiniteError)
    assert all(issubclass(kind, DiDiError) for kind in (*kinds, UnknownTaskError))


class FakeProgram:
    """What a host program holds while the method runs."""

    def __init__(self, taskpool):
        self.taskpool = taskpool


class FakeTaskPool:
    _test_datasets = {"mnist": None, "cars": None, "SVHN": None}

    def _evaluate(self, *_, **__):
        raise NotImplementedError


def test_task_pool_with_a_task_that_is_not_in_the_pool(files, monkeypatch):
    monkeypatch.setattr(pipeline, "merge", lambda *_, **__: 1 / 0)
    monkeypatch.setattr(CLIPVisionModelPool, "load_model", lambda *_: 1 / 0)
    method = DiDiMerging()
    method._program = FakeProgram(FakeTaskPool())
    with pytest.raises(UnknownTaskError) as caught:
        method.run(files)
    message = str(caught.value)
    assert "no merged model covers: ['cars']" in message
    assert "Task pool: ['mnist', 'cars', 'SVHN']" in message
    assert "models: ['mnist', 'svhn', 'eurosat']" in message
    assert "Map names with task_aliases={" in message


def test_pool_of_a_plain_dictionary_and_of_the_host_give_the_same(tiny_clip):
    method = DiDiMerging(budget=0.6)
    one = method.run(tiny_clip.pool_models())
    two = method.run(BaseModelPool(tiny_clip.pool_models()))
    assert one.storage == two.storage and isinstance(one.backbone, nn.Module)
