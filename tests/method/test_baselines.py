"""The methods that DiDi is compared with, each against an obvious reference, and what all of them must do."""

import copy
import inspect

import numpy as np
import pytest
import torch
from dynamic_methods import DYNAMIC
from fusion_bench.method.emr_merging import EMRMerging as HostEMRMerging
from fusion_bench.method.randes import SuperposedTaskArithmeticAlgorithm
from fusion_bench.modelpool import BaseModelPool
from fusion_bench.utils.state_dict_arithmetic import state_dict_sub
from helpers import REPOSITORY, TOWER, OpenClipLike, family
from omegaconf import OmegaConf
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from fusion_bench_didi import method as methods
from fusion_bench_didi.demo.folder_pools import FolderCLIPVisionModelPool
from fusion_bench_didi.errors import ModelPoolError, UnknownTaskError
from fusion_bench_didi.method.base import PoolMethod
from fusion_bench_didi.method.baselines.cat import (
    removal_basis,
    without_conflicts,
    without_directions,
)
from fusion_bench_didi.method.baselines.free import released_filter
from fusion_bench_didi.method.baselines.tall_mask import elected_sum
from fusion_bench_didi.models.dynamic import DynamicModel

CONFIGS = REPOSITORY / "config" / "method" / "didi"


def floats(module: nn.Module) -> dict[str, np.ndarray]:
    return {n: p.detach().double().numpy() for n, p in module.named_parameters()}


def task_vectors(clip) -> dict[str, dict[str, np.ndarray]]:
    base = floats(clip.base)
    return {
        task: {n: v - base[n] for n, v in floats(model).items()}
        for task, model in clip.tuned.items()
    }


def cut(matrix: np.ndarray, rank: int) -> np.ndarray:
    u, s, vh = np.linalg.svd(matrix, full_matrices=False)
    return sum((s[i] * np.outer(u[:, i], vh[i]) for i in range(rank)), 0 * matrix)


def assert_changes(model: DynamicModel, clip, expected, tolerance=1e-6) -> None:
    """Every tensor of every task is the base value plus the expected change."""
    base = floats(clip.base)
    for task in clip.tasks:
        model.set_task(task)
        for name, value in floats(model.backbone).items():
            change = expected(task, name)
            np.testing.assert_allclose(
                value - base[name], change, atol=tolerance, err_msg=f"{task} {name}"
            )


# --- each method against its formula ----------------------------------------------------------------------------------


@pytest.mark.parametrize("fraction", [None, 0.1, 1.0])
@pytest.mark.parametrize("conv", ["dense", "matrix"])
def test_tsv_c(tiny_clip, fraction, conv):
    tau = task_vectors(tiny_clip)

    def expected(task, name):
        value = tau[task][name]
        if value.ndim == 2 or (value.ndim == 4 and conv == "matrix"):
            matrix = value.reshape(len(value), -1)
            share = 1 / 3 if fraction is None else fraction
            return cut(matrix, int(min(matrix.shape) * share)).reshape(value.shape)
        return value

    model = methods.TSVCompression(rank_fraction=fraction, conv=conv).run(
        tiny_clip.pool_models()
    )
    assert_changes(model, tiny_clip, expected)
    if fraction == 1.0:  # factors of full rank are larger than the matrices
        kinds = {e["kind"] for e in _manifest(model)}
        assert kinds == {"dense"}


def _manifest(model) -> list[dict]:
    return [
        {"kind": delta.kind}
        for expert in model.modulators.values()
        for _, delta in expert.deltas.items()
    ]


def _flat(tensors: dict[str, np.ndarray]) -> np.ndarray:
    return np.concatenate([tensors[name].ravel() for name in sorted(tensors)])


def ties_by_the_book(vectors: list[np.ndarray], keep: float) -> np.ndarray:
    trimmed = []
    for vector in vectors:
        limit = np.sort(np.abs(vector))[len(vector) - int(keep * len(vector)) - 1]
        trimmed.append(np.where(np.abs(vector) >= limit, vector, 0))
    sign = np.sign(np.sum(trimmed, axis=0))
    sign[sign == 0] = np.sign(sign.sum())
    merged = np.zeros_like(vectors[0])
    for vector in trimmed:
        merged += np.where(np.sign(vector) == sign, vector, 0)
    return merged


@pytest.mark.parametrize("multi_task", ["ties", "task_arithmetic"])
def test_tall_mask(tiny_clip, multi_task):
    tau = {task: _flat(v) for task, v in task_vectors(tiny_clip).items()}
    merged = np.sum(list(tau.values()), axis=0)
    if multi_task == "ties":
        merged = ties_by_the_book(list(tau.values()), 0.2)
    limits = {"mnist": 0.4, "svhn": 0.6, "eurosat": 0.4}
    model = methods.TallMaskMerging(
        multi_task=multi_task, thresholds={"svhn": 0.6}
    ).run(tiny_clip.pool_models())
    base = _flat(floats(tiny_clip.base))
    for task, vector in tau.items():
        mask = np.abs(vector) > limits[task] * np.abs(merged - vector)
        model.set_task(task)
        change = _flat(floats(model.backbone)) - base
        # an entry on the very edge may fall on the other side in float32
        wrong = ~np.isclose(change, mask * merged, atol=1e-6)
        assert wrong.mean() < 1e-4
        assert 0.05 < mask.mean() < 0.95


def test_the_majority_sign_decides_where_votes_cancel():
    trimmed = torch.tensor([[1.0, 2.0], [-1.0, 3.0]])
    assert elected_sum(trimmed, 1.0).tolist() == [1.0, 5.0]
    assert elected_sum(trimmed, -1.0).tolist() == [-1.0, 5.0]


def test_twin(tiny_clip):
    tau = task_vectors(tiny_clip)

    def expected(task, name):
        value = tau[task][name]
        if value.ndim < 2:
            return value
        shared = 0.3 * sum(tau[t][name] for t in tau)
        rest = (value - shared).reshape(len(value), -1)
        return shared + cut(rest, int(0.1 * min(rest.shape))).reshape(value.shape)

    model = methods.TwinMerging().run(tiny_clip.pool_models())
    assert_changes(model, tiny_clip, expected)


class Sides(nn.Module):
    """Matrices whose smaller sides are given."""

    def __init__(self, *sides: int):
        super().__init__()
        layers = {f"of_{n}": nn.Linear(n, n + 7, bias=False) for n in sides}
        self.layers = nn.ModuleDict(layers)


def ranks_of(model: DynamicModel) -> dict[int, int]:
    """Rank stored of each matrix, by its smaller side; 0 where nothing is."""
    expert, *_ = model.modulators.values()
    sides = {int(n.split(".")[1].split("_")[1]): n for n in model.touched}
    return {
        side: expert.deltas.get(name).rank if expert.deltas.get(name) else 0
        for side, name in sides.items()
    }


@pytest.mark.parametrize("fraction, rate", [(0.1, 0.9), (0.3, 0.7), (0.2, 0.8)])
def test_ranks_of_twin_are_rounded_as_its_code_does(fraction, rate):
    """``int((1 - .9) * 100)`` is 9."""
    sides = (9, 10, 20, 25, 30, 40, 50, 64, 100)
    model = methods.TwinMerging(rank_fraction=fraction).run(family(Sides(*sides)))
    assert ranks_of(model) == {n: int((1 - rate) * n) for n in sides}
    if fraction == 0.1:
        assert ranks_of(model)[100] == 9


@pytest.mark.parametrize("tasks", [2, 3, 5, 10])
def test_ranks_of_tsv_c_are_rounded_as_its_code_does(tasks):
    sides = (10, 20, 30, 35, 60)
    names = tuple(f"t{i}" for i in range(tasks))
    model = methods.TSVCompression().run(family(Sides(*sides), names))
    found = ranks_of(model)
    assert found == {n: int(n * (1 / tasks)) for n in sides}
    assert found == {n: n // tasks for n in sides}, "no rank lost to rounding"


def high_passed(matrix: np.ndarray, gain) -> np.ndarray:
    """A matrix by its discrete Fourier transform, written as products, each frequency times its gain."""
    m, n = matrix.shape
    rows = np.exp(-2j * np.pi * np.outer(range(m), range(m)) / m)
    columns = np.exp(-2j * np.pi * np.outer(range(n), range(n)) / n)
    spectrum = rows @ matrix @ columns
    for i in range(m):
        for j in range(n):
            spectrum[i, j] *= gain(i, j, m, n)
    return (rows.conj() @ spectrum @ columns.conj()).real / (m * n)


def papers_gain(i, j, m, n):
    y, x = (min(i, m - i) / m * 2, min(j, n - j) / n * 2)
    return (y * y + x * x) ** 0.5 >= 0.1


def codes_gain(i, j, m, n):
    distance = ((i - m // 2) ** 2 + (j - n // 2) ** 2) ** 0.5
    low, high = min(m, n) // 10, 0.7 * min(m, n)
    return float(distance <= low) + float(low <= distance <= high)


def largest(values: np.ndarray, count: int) -> np.ndarray:
    """The entries of largest size along the last dimension, zero elsewhere."""
    out = np.zeros_like(values)
    for index in np.ndindex(values.shape[:-1]):
        top = np.argsort(-np.abs(values[index]))[:count]
        out[index][top] = values[index][top]
    return out


def free_of_the_paper(tau: list[np.ndarray], keep: float):
    """Shared part of one weight, and per task what replaces it where it is not zero."""
    filtered = [high_passed(matrix, papers_gain) for matrix in tau]
    sizes = [np.abs(v).mean() for v in filtered]
    shared = sum(s / sum(sizes) * v for s, v in zip(sizes, filtered))
    experts = []
    for matrix, size in zip(tau, sizes):
        kept = largest(matrix, max(1, int(keep * matrix.shape[1])))
        factor = -np.log10(keep) * np.abs(kept[kept != 0]).mean() / size
        experts.append(factor * kept)
    return shared, experts


def free_of_the_code(tau: dict[str, dict[str, np.ndarray]], keep: float):
    """Factors per task, and shared part and experts of every attention or MLP tensor, by name."""
    names = list(next(iter(tau.values())))
    own = [name for name in names if "attn" in name or "mlp" in name]
    factors, filtered, kept = {}, {}, {}
    for task, vector in tau.items():
        filtered[task] = {
            name: high_passed(v, codes_gain) if name in own and v.ndim == 2 else v
            for name, v in vector.items()
        }
        kept[task] = {n: largest(v, int(v.shape[-1] * keep)) for n, v in vector.items()}
        experts = np.mean([np.abs(v).mean() for v in kept[task].values()]) / keep
        means = np.mean([np.abs(v).mean() for v in filtered[task].values()])
        factors[task] = experts * np.log10(keep) / -means
    first = sorted(tau)[0]
    found = {}
    for name in own:
        summed = sum(filtered[task][name] for task in tau)
        if summed.ndim == 1:
            summed = tau[first][name]
        shared = 0.5 * summed  # and everything once more by .5
        parts = {task: factors[task] * kept[task][name] for task in tau}
        found[name] = {
            task: 0.5 * np.where((part != 0) & (shared != 0), part, shared + part)
            for task, part in parts.items()
        }
    return factors, found


@pytest.mark.parametrize("keep", [0.1, 0.25])
def test_free_of_the_paper(tiny_clip, keep):
    tau = task_vectors(tiny_clip)
    tasks = list(tau)
    known = {}

    def expected(task, name):
        if "attn" not in name and "mlp" not in name:
            return 0 * tau[task][name]
        vectors = [tau[t][name] for t in tasks]
        if vectors[0].ndim < 2:
            return np.mean(vectors, axis=0)
        if name not in known:
            known[name] = free_of_the_paper(vectors, keep)
        shared, experts = known[name]
        expert = experts[tasks.index(task)]
        return np.where(expert == 0, shared, expert)

    model = methods.FreeMerging(keep=keep).run(tiny_clip.pool_models())
    assert_changes(model, tiny_clip, expected)


@pytest.mark.parametrize("biases", ["released", "mean", "pretrained"])
@pytest.mark.parametrize("keep", [0.1, 0.2])
def test_free_of_the_code(tiny_clip, keep, biases):
    """One factor per task, over all tensors; biases are the one thing that the default does otherwise."""
    tau = task_vectors(tiny_clip)
    factors, found = free_of_the_code(tau, keep)

    def expected(task, name):
        if name not in found:
            return 0 * tau[task][name]
        if tau[task][name].ndim == 1 and biases != "released":
            mean = np.mean([tau[t][name] for t in tau], axis=0)
            return mean if biases == "mean" else 0 * mean
        return found[name][task]

    method = methods.FreeMerging(filter="code", keep=keep, biases=biases)
    model = method.run(tiny_clip.pool_models())
    ours = dict(zip(sorted(tau), method._factors))
    assert ours == pytest.approx(factors, rel=1e-5)
    assert_changes(model, tiny_clip, expected)


def test_free_of_the_code_takes_all_tensors_into_its_factor(make_tiny_clip):
    """A larger change of a tensor that is not merged moves the experts of all that are, of this task alone."""
    clip = make_tiny_clip()
    method = methods.FreeMerging(filter="code", keep=0.2)
    method.run(clip.pool_models())
    before = dict(zip(sorted(clip.tasks), method._factors))
    name = f"{TOWER}embeddings.patch_embedding.weight"
    base, value = (m.get_parameter(name).data for m in (clip.base, clip.tuned["svhn"]))
    value.copy_(base + 10 * (value - base))
    method.run(clip.pool_models())
    after = dict(zip(sorted(clip.tasks), method._factors))
    assert after["svhn"] < 0.95 * before["svhn"]
    assert after["mnist"] == before["mnist"]
    factors, _ = free_of_the_code(task_vectors(clip), 0.2)
    assert after == pytest.approx(factors, rel=1e-5)


def test_free_of_the_code_on_a_convolution_and_a_scalar():
    """Other shapes take part in the factor as they are: scalars whole, convolutions along their last side."""
    models = family(OpenClipLike(), ("a", "b"))
    method = methods.FreeMerging(filter="code", keep=0.2)
    model = method.run(BaseModelPool(models))
    base = floats(models["_pretrained_"])
    tau = {
        t: {n: v - base[n] for n, v in floats(models[t]).items()} for t in ("a", "b")
    }
    for task, factor in zip(("a", "b"), method._factors):
        experts, rest = [], []
        for name, v in tau[task].items():
            kept = v if v.ndim == 0 else largest(v, int(v.shape[-1] * 0.2))
            filtered = "attn" in name and v.ndim == 2
            experts.append(np.abs(kept).mean())
            rest.append(np.abs(high_passed(v, codes_gain) if filtered else v).mean())
        mean = np.mean(experts) / 0.2 / np.mean(rest)
        assert factor == pytest.approx(-np.log10(0.2) * mean, rel=1e-5)
    assert not any(name.startswith("conv") for name in model.touched)


def test_free_of_the_code_on_real_towers(suite_real8):
    """The released code's factors there, as its authors' code computes them: 5.85 to 6.12."""
    pool = FolderCLIPVisionModelPool(root=str(suite_real8))
    method = methods.FreeMerging(filter="code")
    method.run(pool)
    assert min(method._factors) == pytest.approx(5.85, abs=0.005)
    assert max(method._factors) == pytest.approx(6.12, abs=0.005)


def test_free_of_the_code_says_where_it_keeps_nothing(tiny_clip, caplog):
    """Rows of 32 and 64 entries, of which 1 % is less than one."""
    model = methods.FreeMerging(filter="code").run(tiny_clip.pool_models())
    assert "keep=0.01 keeps no entry" in caplog.text
    assert all(s == 0 for s in map(_entries, model.modulators.values()))


def _entries(expert) -> int:
    return sum(delta.values.numel() for delta in expert.deltas.values())


@pytest.mark.parametrize("shape", [(32, 32), (64, 32), (50, 70), (9, 24), (100, 60)])
def test_the_released_filter(shape):
    """Twice at exactly a tenth of the smaller side: four frequencies, or more where the circle meets more."""
    gains = released_filter(*shape, 0.7).numpy()
    m, n = shape
    expected = [[codes_gain(i, j, m, n) for j in range(n)] for i in range(m)]
    np.testing.assert_array_equal(gains, expected)
    radius = min(shape) // 10
    twice = {0: 1, 5: 12}.get(radius, 4)
    assert (gains == 2).sum() == twice


def test_the_released_filter_depends_on_the_shape():
    kept = {
        shape: (released_filter(*shape, 0.7) > 0).float().mean().item()
        for shape in [(768, 768), (2304, 768), (3072, 768)]
    }
    assert kept[768, 768] == pytest.approx(0.9998, abs=2e-4)
    assert kept[2304, 768] == pytest.approx(0.42, abs=0.01)
    assert kept[3072, 768] == pytest.approx(0.32, abs=0.01)


def test_free_needs_attention_or_mlp_tensors(tiny_clip):
    with pytest.raises(ModelPoolError, match="matches patterns"):
        methods.FreeMerging(patterns=["*nowhere*"]).run(tiny_clip.pool_models())


def test_randes_is_the_hosts(tiny_clip, monkeypatch):
    """What the host superposes; its signs are others in every process, so that it is given ours."""
    method, tasks = methods.RanDeS(scaling_factor=0.4), list(tiny_clip.tuned)
    ours = method.run(tiny_clip.pool_models())
    assert ours.storage.x_excl == pytest.approx(1, abs=0.01)
    targets = [
        (name, task, value.shape[-1])
        for name, value in tiny_clip.base.state_dict().items()
        if name.endswith("weight") and ("mlp" in name or "attn" in name)
        for task in tasks
    ]
    drawn = iter([method.signs(task, name, n) > 0 for name, task, n in targets])
    monkeypatch.setattr(
        np.random, "binomial", lambda p, n, size: next(drawn).view(size).numpy()
    )
    host = SuperposedTaskArithmeticAlgorithm(
        scaling_factor=0.4,
        mode="random_binary_diagonal_matrix",
        target_layer=["mlp_w", "attn_w"],
        random_seed=0,
        different_across_layers=True,
        joint_matrix_mode="flatten_hstack",
        rank=1,
        random_components=False,
        shift_layers=0,
        absorber="None",
        debug=0,
        ms_mode="average",
        verbose=0,
        dropout_rate=1,
    )
    base = tiny_clip.base.state_dict()
    vectors = {
        task: state_dict_sub(tuned.state_dict(), base)
        for task, tuned in tiny_clip.tuned.items()
    }
    found, _ = host._compress_and_retrieve(vectors, mode="superposed_task_arithmetic")
    assert next(drawn, None) is None
    for task in tasks:
        ours.set_task(task)
        state = ours.backbone.state_dict()
        for name, value in found[task].items():
            torch.testing.assert_close(state[name], base[name] + 0.4 * value)


def test_emr_is_the_hosts(tiny_clip):
    ours = methods.EMRMerging().run(tiny_clip.pool_models())
    for task in tiny_clip.tasks:
        # a fresh one per task: the host's adds and subtracts in place
        host = HostEMRMerging().run(copy.deepcopy(tiny_clip.pool_models()))
        host.set_task(task)
        ours.set_task(task)
        theirs = dict(host.backbone.named_parameters())
        for name, value in ours.backbone.named_parameters():
            assert torch.equal(value, theirs[name]), (task, name)


# --- CAT --------------------------------------------------------------------------------------------------------------


class PoolWithImages(BaseModelPool):
    """Six random images per task; the first entry of a sample is the image."""

    def __init__(self, models, train=(), val=()):
        super().__init__(models)
        self._train_datasets = {name: None for name in train}
        self._val_datasets = {name: None for name in val}

    def load_train_dataset(self, name):
        noise = np.random.default_rng(len(name)).integers(0, 255, (6, 32, 32, 3))
        return [(Image.fromarray(image.astype("uint8")), 0) for image in noise]

    load_val_dataset = load_train_dataset

    def load_processor(self):
        return lambda image: (
            torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255 - 0.5
        )


def pixels_of(pool, task, count, seed):
    chosen = torch.randperm(6, generator=torch.Generator().manual_seed(seed))[:count]
    dataset = pool.load_train_dataset(task)
    return torch.stack([pool.load_processor()(dataset[i][0]) for i in chosen.tolist()])


def inputs_of(model, name, pixels):
    """Inputs (N, n) of one module, layer norms before scale and shift."""
    module, found = model.get_submodule(name), []
    handle = module.register_forward_hook(lambda m, args, out: found.append(args[0]))
    with torch.no_grad():
        model(pixels)
    handle.remove()
    rows = found[0].flatten(0, -2).double().numpy()
    if isinstance(module, nn.LayerNorm):
        rows = rows - rows.mean(1, keepdims=True)
        rows = rows / np.sqrt((rows**2).mean(1, keepdims=True) + module.eps)
    return rows


def cat_by_the_book(clip, pool, name, *, directions, weight, images, seed):
    tau = task_vectors(clip)
    owner, _, leaf = name.rpartition(".")
    module = clip.base.get_submodule(owner)
    vectors = {task: tau[task][name] for task in clip.tasks}
    if not isinstance(module, (nn.Linear, nn.LayerNorm)):
        return sum(vectors.values())
    moments = {}
    for task, model in clip.tuned.items():
        if leaf == "bias":
            moments[task] = np.eye(len(vectors[task]))
            continue
        rows = inputs_of(model, owner, pixels_of(pool, task, images, seed))
        moments[task] = sum(np.outer(x, x) for x in rows) / len(rows)
    left = {task: vector.copy() for task, vector in vectors.items()}
    for k in sorted(vectors):
        others = [i for i in vectors if i != k]
        if vectors[k].ndim == 2:
            g = 0
            for i in others:
                worth = moments[k] - weight * moments[i]
                g = g + vectors[i] @ worth @ vectors[i].T
            values, basis = np.linalg.eigh(g)
            for value, b in list(zip(values, basis.T))[::-1][:directions]:
                for i in others:
                    if value > 0:
                        left[i] = left[i] - np.outer(b, b @ left[i])
        else:
            g = np.zeros(len(vectors[k]))
            for i in others:
                worth = np.diag(moments[k]) - weight * np.diag(moments[i])
                g += worth * vectors[i] ** 2
            for j in np.argsort(-g)[:directions]:
                for i in others:
                    if g[j] > 0:
                        left[i][j] = 0
    return sum(left.values())


@pytest.mark.parametrize("weight", [0.5, 5.0])
@pytest.mark.parametrize("images", [1, 3])
def test_cat(tiny_clip, weight, images):
    pool = PoolWithImages(tiny_clip.pool_models(), train=tiny_clip.tasks)
    options = {"directions": 2, "weight": weight, "images": images, "seed": 4}
    merged = methods.CATMerging(scale=0.5, **options).run(pool)
    assert type(merged) is type(tiny_clip.base)
    base, result = floats(tiny_clip.base), floats(merged)
    cut_tensors, cut_shifts = 0, 0
    for name, value in result.items():
        expected = cat_by_the_book(tiny_clip, pool, name, **options)
        np.testing.assert_allclose(
            value - base[name], 0.5 * expected, atol=1e-6, err_msg=name
        )
        whole = sum(v[name] for v in task_vectors(tiny_clip).values())
        cut_tensors += not np.allclose(expected, whole)
        cut_shifts += name.endswith("bias") and not np.allclose(expected, whole)
    assert cut_tensors > 10
    assert (cut_shifts > 0) == (weight < 1)


def rows_of(*directions: float) -> torch.Tensor:
    """Inputs whose second moment is diagonal."""
    return torch.diag(torch.tensor(directions)) * len(directions) ** 0.5


def test_cat_cuts_what_disturbs_the_task_that_asks():
    """Task 0 has inputs along x alone, where task 1 writes into output 0: that is cut from task 1, and from no other."""
    inputs = [rows_of(1.0, 0.0), rows_of(0.0, 1.0)]
    vectors = torch.zeros(2, 3, 2)
    vectors[1] = torch.tensor([[2.0, 0.0], [0.0, 5.0], [0.0, 0.0]])
    vectors[0, 2, 0] = 1.0
    found = [removal_basis(vectors, inputs, k, count=2, weight=1.0) for k in (0, 1)]
    torch.testing.assert_close(found[0].abs(), torch.tensor([[1.0], [0.0], [0.0]]))
    assert found[1].shape == (3, 0), "task 0 does nothing to what task 1 sees"
    left = without_directions(vectors, found)
    assert left[1].tolist() == [[0.0, 0.0], [0.0, 5.0], [0.0, 0.0]]
    assert torch.equal(left[0], vectors[0])


def test_cat_keeps_what_is_worth_more_to_the_task_that_has_it():
    """What task 1 writes for its own inputs is kept where lambda weighs that more than task 0's disturbance."""
    inputs = [rows_of(1.0, 1.0), rows_of(1.0, 1.0)]
    vectors = torch.zeros(2, 3, 2)
    vectors[1, 0, 0] = 2.0
    options = {"count": 2, "weight": 1.5}
    assert removal_basis(vectors, inputs, 0, **options).shape[1] == 0
    options["weight"] = 0.5
    assert removal_basis(vectors, inputs, 0, **options).shape[1] == 1


def test_cat_cuts_coordinates_of_others():
    vectors = torch.tensor([[1.0, 0.0, 3.0], [2.0, 1.0, 0.0]])
    energies = torch.tensor([[1.0, 0.0, 0.0], [0.1, 1.0, 1.0]])
    left = without_conflicts(vectors, energies, count=1, weight=1.0)
    # task 0 uses coordinate 0, which task 1 hardly does; task 1 uses coordinate 2, which task 0 does not
    assert left.tolist() == [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]


def test_cat_cuts_no_more_directions_than_there_are():
    vectors = torch.randn(3, 2, 5, generator=torch.Generator().manual_seed(0))
    inputs = [torch.randn(4, 5) for _ in range(3)]
    basis = removal_basis(vectors, inputs, 1, count=7, weight=0.0)
    torch.testing.assert_close(basis.mT @ basis, torch.eye(2))


def test_cat_without_directions_is_task_arithmetic(tiny_clip):
    """And looks at no images."""
    merged = floats(methods.CATMerging(directions=0).run(tiny_clip.pool_models()))
    tau, base = task_vectors(tiny_clip), floats(tiny_clip.base)
    for name in base:
        whole = base[name] + 0.3 * sum(v[name] for v in tau.values())
        np.testing.assert_allclose(merged[name], whole, atol=1e-6)


def test_cat_keeps_the_digits_of_a_base_model_of_doubles():
    base = nn.Linear(8, 8).double()
    with torch.no_grad():
        base.weight *= 100
    pool = family(base)
    tuned = [floats(pool[task]) for task in ("mnist", "svhn")]
    merged, start = floats(methods.CATMerging(directions=0).run(pool)), floats(base)
    for name, value in start.items():
        whole = value + 0.3 * sum(one[name] - value for one in tuned)
        np.testing.assert_allclose(merged[name], whole, rtol=0, atol=1e-7)


def test_cat_leaves_the_pool_alone(tiny_clip):
    pool = PoolWithImages(tiny_clip.pool_models(), train=tiny_clip.tasks)
    before = {name: floats(copy.deepcopy(m)) for name, m in pool.named_models()}
    methods.CATMerging().run(pool)
    for name, model in pool.named_models():
        for key, value in floats(model).items():
            np.testing.assert_array_equal(value, before[name][key])
        assert not any(m._forward_pre_hooks for m in model.modules())


def test_cat_says_which_tasks_have_no_images(tiny_clip):
    pool = PoolWithImages(tiny_clip.pool_models(), train=["mnist"], val=["SVHN"])
    with pytest.raises(ModelPoolError, match=r"none for \['eurosat'\]"):
        methods.CATMerging().run(pool)


# --- what all dynamic methods must do ---------------------------------------------------------------------------------


@pytest.fixture(params=DYNAMIC)
def dynamic(request):
    return DYNAMIC[request.param]()


def test_account_is_what_is_written(dynamic, tiny_clip, tmp_path):
    model = dynamic.run(tiny_clip.pool_models())
    model.save_pretrained(tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    bits = 8 * sum(t.nbytes for t in load_file(file).values())
    storage = model.storage
    assert bits == storage.excl_bits
    header = 8 + int.from_bytes(file.read_bytes()[:8], "little")
    assert 8 * (file.stat().st_size - header) == bits
    parameters = sum(p.numel() for p in tiny_clip.base.parameters())
    assert storage.unit_bits == 32 * parameters
    assert storage.x_incl <= storage.x_excl + 1


def test_saved_and_loaded_models_agree(dynamic, tiny_clip, tmp_path):
    model = dynamic.run(tiny_clip.pool_models())
    model.save_pretrained(tmp_path / "model")
    loaded = DynamicModel.from_pretrained(
        tmp_path / "model", backbone=copy.deepcopy(tiny_clip.base)
    )
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert loaded.storage == model.storage
    assert loaded.info["method"] == dynamic.title
    for task in reversed(tiny_clip.tasks):
        model.set_task(task)
        loaded.set_task(task)
        alone = model.materialize(task).eval()
        with torch.no_grad():
            outputs = [m(pixels).pooler_output for m in (model, loaded, alone)]
        assert torch.equal(outputs[0], outputs[1])
        assert torch.equal(outputs[0], outputs[2])
    assert type(alone) is type(tiny_clip.base)


def test_order_of_the_pool_changes_nothing(dynamic, tiny_clip):
    models = tiny_clip.pool_models()
    turned = dict(reversed(models.items()))
    one, other = dynamic.run(models), dynamic.run(turned)
    for task in tiny_clip.tasks:
        one.set_task(task)
        other.set_task(task)
        pairs = zip(one.backbone.parameters(), other.backbone.parameters())
        assert all(torch.equal(a, b) for a, b in pairs)


def test_the_pool_stays_as_it_was(dynamic, tiny_clip):
    before = {n: floats(copy.deepcopy(m)) for n, m in tiny_clip.pool_models().items()}
    dynamic.run(tiny_clip.pool_models()).set_task("mnist")
    for name, model in tiny_clip.pool_models().items():
        for key, value in floats(model).items():
            np.testing.assert_array_equal(value, before[name][key])


def test_untouched_tensors_and_idle_tasks(dynamic, tiny_clip):
    """A tensor that nobody changed costs nothing; a task that changed nothing is no division by zero."""
    untouched = f"{TOWER}embeddings.position_embedding.weight"
    with torch.no_grad():
        base = dict(tiny_clip.base.named_parameters())
        for task, model in tiny_clip.tuned.items():
            for name, value in model.named_parameters():
                if name == untouched or task == "svhn":
                    value.copy_(base[name])
    model = dynamic.run(tiny_clip.pool_models())
    assert untouched in base
    assert untouched not in model.touched
    assert untouched not in model.storage.layer_bits
    for task in tiny_clip.tasks:
        assert all(p.isfinite().all() for p in model.materialize(task).parameters())


def test_half_precision_checkpoints(dynamic, make_tiny_clip, tmp_path):
    clip = make_tiny_clip()
    models = {n: m.bfloat16() for n, m in clip.pool_models().items()}
    model = dynamic.run(models)
    assert model.storage.unit_bits == 16 * sum(
        p.numel() for p in clip.base.parameters()
    )
    model.save_pretrained(tmp_path / "model")
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    assert 8 * sum(t.nbytes for t in tensors.values()) == model.storage.excl_bits
    model.set_task("mnist")
    assert next(model.backbone.parameters()).dtype == torch.bfloat16


def test_excluded_tensors_stay(dynamic, tiny_clip):
    dynamic.exclude = ["*layers.0*"]
    model = dynamic.run(tiny_clip.pool_models())
    model.set_task("mnist")
    base = dict(tiny_clip.base.named_parameters())
    for name, value in model.backbone.named_parameters():
        if "layers.0" in name:
            assert torch.equal(value, base[name])


# --- configuration ----------------------------------------------------------------------------------------------------


YAML = ["tsv_c", "tall_mask", "twin", "free", "cat", "emr", "randes"]
YAML += ["bitdelta", "dare", "t_switch", "compeft", "tvq", "ultra_delta"]
YAML += ["lossless", "delta_come"]


@pytest.mark.parametrize("name", YAML)
def test_yaml_is_the_constructor(name):
    config = OmegaConf.to_container(OmegaConf.load(CONFIGS / f"{name}.yaml"))
    cls = getattr(methods, config.pop("_target_").rpartition(".")[2])
    signature = {}
    for base in reversed(cls.__mro__[: cls.__mro__.index(PoolMethod)]):
        own = vars(base).get("__init__")
        own = {} if own is None else inspect.signature(own).parameters
        signature = {k: p for k, p in own.items() if k not in signature} | signature
    keys = [k for k in signature if k not in ("self", "kwargs")]
    assert list(config) == keys
    defaults = {k: signature[k].default for k in keys}
    plain = {k: list(v) if isinstance(v, tuple) else v for k, v in defaults.items()}
    assert config == plain


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: methods.TSVCompression(conv="low"), "conv='low'"),
        (lambda: methods.TSVCompression(rank_fraction=0), "rank_fraction=0"),
        (lambda: methods.TSVCompression(bits=0), "bits=0"),
        (lambda: methods.TSVCompression(bits=2, fold_sigma=False), "fold_sigma"),
        (lambda: methods.TallMaskMerging(multi_task="sum"), "multi_task='sum'"),
        (lambda: methods.TallMaskMerging(ties_keep=20), "ties_keep=20"),
        (lambda: methods.TwinMerging(conv="low"), "conv='low'"),
        (lambda: methods.TwinMerging(rank_fraction=2), "rank_fraction=2"),
        (lambda: methods.FreeMerging(filter="none"), "filter='none'"),
        (lambda: methods.FreeMerging(biases="first"), "biases='first'"),
        (lambda: methods.FreeMerging(biases="released"), "is of filter=code"),
        (lambda: methods.FreeMerging(keep=1), "keep=1"),
        (lambda: methods.CATMerging(images=0), "images=0"),
    ],
)
def test_impossible_settings_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_thresholds_of_unknown_tasks_are_refused(tiny_clip):
    method = methods.TallMaskMerging(thresholds={"cars": 0.3})
    with pytest.raises(UnknownTaskError, match="cars"):
        method.run(tiny_clip.pool_models())
