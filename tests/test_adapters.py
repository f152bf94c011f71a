"""LoRA adapters in place of fine-tuned checkpoints: the same models as after PEFT's own merging, read as factors."""

import copy
import json
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from fusion_bench.modelpool import BaseModelPool, CausalLMPool, CLIPVisionModelPool
from helpers import (
    BASE,
    OpenClipLike,
    combinations,
    didi,
    floats,
    merge_settings,
    same_bits,
)
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from fusion_bench_didi.errors import (
    CheckpointMismatchError,
    ModelPoolError,
    NonFiniteError,
)
from fusion_bench_didi.lowrank.factors import LowRankFactors
from fusion_bench_didi.merging.pipeline import merge
from fusion_bench_didi.method.baselines.emr import EMRMerging
from fusion_bench_didi.method.baselines.free import FreeMerging
from fusion_bench_didi.method.baselines.tall_mask import TallMaskMerging
from fusion_bench_didi.method.baselines.tsv_c import TSVCompression
from fusion_bench_didi.method.baselines.twin import TwinMerging
from fusion_bench_didi.models.dynamic import DiDiModel
from fusion_bench_didi.pools.merged_adapters import adapted
from fusion_bench_didi.pools.opening import open_pool
from fusion_bench_didi.task_vectors.sources import SafetensorsSource

# PEFT on what it saves beside the adapter, and on layouts that it corrects itself.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft")

TASKS = ("mnist", "svhn", "eurosat")

QUERY = "model.layers.1.self_attn.q_proj.weight"


def llama() -> nn.Module:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "vocab_size": 40}
    shape = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, **shape))


def gpt2(tied: bool = True) -> nn.Module:
    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": 30}
    config = GPT2Config(**sizes, n_positions=8, tie_word_embeddings=tied)
    return GPT2LMHeadModel(config)


def clip() -> nn.Module:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    images = {"image_size": 32, "patch_size": 8, "projection_dim": 32}
    return CLIPVisionModel(CLIPVisionConfig(**sizes, **images, num_attention_heads=4))


ATTENTION = ["q_proj", "v_proj"]
#: What PEFT can do to a model, by model.
KINDS: dict[str, tuple[Any, dict]] = {
    "llama": (llama, {"target_modules": [*ATTENTION, "up_proj"], "lora_alpha": 3}),
    "llama, patterns and root": (
        llama,
        {
            "target_modules": [*ATTENTION, "down_proj"],
            "rank_pattern": {"v_proj": 2, r".*\.0\.mlp\.down_proj": 5},
            "alpha_pattern": {"layers.1.self_attn.v_proj": 9},
            "use_rslora": True,
        },
    ),
    "llama, head and norm": (
        llama,
        {"target_modules": ATTENTION, "modules_to_save": ["lm_head", "norm"]},
    ),
    "llama, head as pair": (llama, {"target_modules": ["q_proj", "lm_head"]}),
    "clip": (clip, {"target_modules": [*ATTENTION, "fc1", "patch_embedding"]}),
    "clip, biases": (clip, {"target_modules": ["fc1"], "bias": "all"}),
    "gpt2": (gpt2, {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    # the head comes last, and PEFT then writes fan_in_fan_out=false for all of them
    "gpt2, head": (
        lambda: gpt2(tied=False),
        {"target_modules": ["c_attn", "c_proj", "lm_head"], "fan_in_fan_out": True},
    ),
    "convolution in memory": (
        OpenClipLike,
        {"target_modules": ["conv1"], "modules_to_save": ["ln"]},
    ),
}


def write_adapter(base: nn.Module, place: Path, seed: int, **config: Any) -> nn.Module:
    """Train an adapter (draw it), save it, and give the model with it merged in."""
    options = {"r": 3, "lora_alpha": 6, "init_lora_weights": False, **config}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = get_peft_model(copy.deepcopy(base), LoraConfig(**options))
        trained = [p for p in model.parameters() if p.requires_grad]
        with torch.no_grad():
            for value in trained:
                value += 0.02 * torch.randn(value.shape)
    model.save_pretrained(place)
    return model.merge_and_unload()


def family(directory: Path, make, tasks=TASKS, **config: Any) -> dict[str, nn.Module]:
    """The base model and one adapter per task in a directory; returns the whole models."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        base = make().eval()
    models = {BASE: base}
    for seed, task in enumerate(tasks, 1):
        models[task] = write_adapter(base, directory / task, seed, **config).eval()
    if hasattr(base, "save_pretrained"):
        base.save_pretrained(directory / BASE)
    return models


def pool_of(directory: Path, base: nn.Module, names=TASKS) -> BaseModelPool:
    """A pool of adapters, around a base model from a directory where it can be saved to one."""
    entries = {BASE: base, **{name: str(directory / name) for name in names}}
    if isinstance(base, OpenClipLike):
        return BaseModelPool(entries)
    entries[BASE] = str(directory / BASE)
    if isinstance(base, CLIPVisionModel):
        return CLIPVisionModelPool(entries)
    return CausalLMPool(entries, tokenizer=None)


@pytest.fixture(scope="session", params=KINDS)
def kind(request, tmp_path_factory):
    """A directory of adapters, and the whole models."""
    make, config = KINDS[request.param]
    directory = tmp_path_factory.mktemp("adapters")
    return directory, family(directory, make, **config)


@pytest.fixture
def llamas(tmp_path):
    """Adapters that a test may damage."""
    models = family(tmp_path, llama, target_modules=ATTENTION)
    return tmp_path, models, pool_of(tmp_path, models[BASE])


def change_config(directory: Path, **values: Any) -> None:
    file = directory / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def change_tensors(directory: Path, change) -> None:
    file = directory / "adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def assert_close(
    model: DiDiModel, other: Any, *, names: list[str] | None = None, atol: float = 1e-6
) -> None:
    """Weights of every task, against another merged model or whole models."""
    for task in model.tasks:
        whole = other[task] if isinstance(other, dict) else other.materialize(task)
        found, expected = floats(model.materialize(task)), floats(whole)
        for name in expected if names is None else names:
            torch.testing.assert_close(
                found[name], expected[name], atol=atol, rtol=1e-5, msg=f"{task} {name}"
            )


# --- adapters and whole models are one ------------------------------------------


def test_every_task_comes_back_whatever_peft_did(kind):
    directory, models = kind
    model = didi(pool_of(directory, models[BASE]), budget=float("inf"))
    assert_close(model, models)


@pytest.mark.parametrize("allocation", ["uniform", "greedy"])
@pytest.mark.parametrize("shared", ["mean", "ties"])
def test_presets_store_every_adapter_exactly_and_no_more(kind, shared, allocation):
    directory, models = kind
    pool = pool_of(directory, models[BASE])
    choice = {"shared": shared, "allocation": allocation, "factor_dtype": "auto"}
    model = didi(pool, budget=1.4, **choice)
    # ``auto`` stores vectors in bfloat16 where they are many
    exact = [n for n in model.touched if model.backbone.get_parameter(n).ndim > 1]
    assert_close(model, models, names=exact)
    vectors = open_pool(pool, copy.deepcopy(models[BASE]))
    unit = sum(32 * info.numel for info in vectors.infos.values())
    assert model.storage.unit_bits == unit
    needed = 0
    for name, info in vectors.infos.items():
        sides = info.shape[0] + info.numel // info.shape[0]
        for rank in vectors.ranks(name):
            whole = rank is None or rank * sides >= info.numel
            needed += 32 * (info.numel if whole else rank * sides)
    assert model.storage.excl_bits <= needed


def test_generous_budget_of_many_adapters_is_spent_on_nothing_but_their_ranks(tmp_path):
    """Common subspaces would hold them too, with larger cores than the experts are."""
    tasks = tuple("abcdefgh")
    models = family(tmp_path, llama, tasks, target_modules=ATTENTION, r=2)
    pool = pool_of(tmp_path, models[BASE], tasks)
    model = didi(pool, budget=2.0, factor_dtype="auto")
    assert not model.info["subspaces"] and not model.storage.shared_bits
    for ranks in model.info["ranks"]["experts"].values():
        assert set(ranks.values()) == {2}
    assert_close(model, models)


@pytest.mark.parametrize("residual", ["truncated", "full"])
@pytest.mark.parametrize("budget", [0.05, 0.12])
def test_small_budget_cuts_adapters_like_whole_models(kind, budget, residual):
    directory, models = kind
    choice = {"budget": budget, "residual": residual, "refinement": "none"}
    choice["vectors"] = "pretrained"
    one = didi(pool_of(directory, models[BASE]), **choice)
    two = didi(models, **choice)
    assert one.storage.as_dict() == two.storage.as_dict()
    assert one.info["ranks"] == two.info["ranks"]
    found, expected = one.info["relative_error"], two.info["relative_error"]
    assert found == pytest.approx(expected, rel=1e-4)
    assert_close(one, two, atol=1e-5)


@pytest.mark.parametrize("factor_dtype", ["int4", "auto"])
def test_rounding_with_a_shared_part_is_that_of_whole_models(tmp_path, factor_dtype):
    """Adapters with much in common, so that a shared part is bought and the rest is refitted to what it rounds to."""
    models = related(tmp_path)
    choice = {"budget": 0.04, "factor_dtype": factor_dtype, "refine_sweeps": 20}
    one = didi(pool_of(tmp_path, models[BASE]), **choice)
    two = didi(models, **choice)
    assert one.storage.shared_bits > 0
    assert one.storage.as_dict() == two.storage.as_dict()
    lost, expected = one.info["relative_error"], two.info["relative_error"]
    assert lost == pytest.approx(expected, rel=0.02)
    base, kept = floats(models[BASE]), 0.0
    for task in TASKS:
        found, whole = floats(one.materialize(task)), floats(models[task])
        kept += sum(float((whole[n] - found[n]).square().sum()) for n in base)
    total = sum(
        float((floats(models[task])[n] - base[n]).square().sum())
        for task in TASKS
        for n in base
    )
    assert lost == pytest.approx(kept / total, rel=1e-3)


@pytest.mark.parametrize("budget", [0.06, 0.1])
@pytest.mark.parametrize("shared", ["auto", "subspaces"])
def test_adapters_that_start_alike_share_subspaces(tmp_path, shared, budget):
    """One lora_A for all tasks: common rows, found in the frame of the factors as among the entries."""
    models = family(tmp_path, llama, target_modules=ATTENTION, r=4)
    first = load_file(tmp_path / TASKS[0] / "adapter_model.safetensors")
    for task in TASKS:
        change_tensors(
            tmp_path / task,
            lambda t: t.update({n: first[n] for n in t if "lora_A" in n}),
        )
        models[task] = adapted(pool_of(tmp_path, models[BASE])).load_model(task)
    choice = {"shared": shared, "budget": budget, "refine_sweeps": 20}
    one, two = didi(pool_of(tmp_path, models[BASE]), **choice), didi(models, **choice)
    assert one.info["subspaces"] == two.info["subspaces"] != {}
    assert one.storage.as_dict() == two.storage.as_dict()
    lost, expected = one.info["relative_error"], two.info["relative_error"]
    assert lost == pytest.approx(expected, rel=1e-3)


def related(directory: Path) -> dict[str, nn.Module]:
    """Three adapters that are one adapter with a little of their own."""
    models = family(directory, llama, target_modules=ATTENTION)
    first = load_file(directory / TASKS[0] / "adapter_model.safetensors")
    for task in TASKS:
        change_tensors(
            directory / task,
            lambda t: t.update({n: first[n] + 0.1 * v for n, v in t.items()}),
        )
        pool = adapted(pool_of(directory, models[BASE]))
        models[task] = pool.load_model(task)
    return models


# --- never dense ------------------------------------------------------------------


@pytest.mark.parametrize(
    "choice",
    combinations(
        allocation=["learned"],
        factor_dtype=["auto", "int4", "float32"],
        residual=["truncated", "full"],
        refinement=["alternating", "adam"],
    ),
)
@pytest.mark.parametrize("budget", [1e-4, 0.02, 0.05])
def test_no_product_is_formed(tmp_path, monkeypatch, choice, budget):
    sides = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}
    related_to = {"target_modules": [*ATTENTION, "down_proj"], "r": 2}
    family(
        tmp_path,
        lambda: LlamaForCausalLM(
            LlamaConfig(**sides, num_hidden_layers=1, vocab_size=20)
        ),
        **related_to,
    )
    pool = CausalLMPool({n: str(tmp_path / n) for n in (BASE, *TASKS)}, tokenizer=None)
    vectors = open_pool(pool, pool.load_pretrained_model())
    dense = LowRankFactors.dense

    def small(self):
        assert max(self.shape) <= 3 * 2, f"{tuple(self.shape)} was multiplied out"
        return dense(self)

    monkeypatch.setattr(LowRankFactors, "dense", small)
    result = merge(vectors, merge_settings(budget, **choice))
    assert result.storage.x_excl <= budget
    assert 0 < result.report.relative_error < 1 + 1e-6
    assert budget < 0.01 or result.storage.x_excl > 0


MEMORY = """
    import resource, sys, torch
    torch.set_num_threads(1)
    from fusion_bench_didi.task_vectors.lora_adapter import AdapterSource
    from fusion_bench_didi.merging.settings import Budget
    from fusion_bench_didi.merging.settings import MergeSettings
    from fusion_bench_didi.merging.pipeline import merge
    from fusion_bench_didi.task_vectors.sources import TensorInfo, TensorSource
    from fusion_bench_didi.task_vectors.reader import TaskVectors

    side, rank, tasks = 8192, 8, "abcd"

    class Source(TensorSource):
        label = "base"
        def __init__(self, **tensors): self.tensors = tensors
        def infos(self):
            return {n: TensorInfo(tuple(t.shape), t.dtype) for n, t in self.tensors.items()}
        def read(self, name): return self.tensors[name]

    def adapter(seed):
        g = torch.Generator().manual_seed(seed)
        a, b = torch.randn(rank, side, generator=g), torch.randn(side, rank, generator=g)
        return Source(**{"w.lora_A.weight": a, "w.lora_B.weight": b})

    # one number seen side x side times
    base = Source(**{"w.weight": torch.ones(1, 1).expand(side, side)})
    config = {"peft_type": "LORA", "r": rank}
    tuned = {t: AdapterSource(adapter(ord(t)), config, base.infos()) for t in tasks}
    torch.linalg.svd(torch.randn(64, 64, dtype=torch.float64))  # loads the library
    pages = int(open("/proc/self/statm").read().split()[0])
    room = pages * resource.getpagesize() + 2**27
    resource.setrlimit(resource.RLIMIT_AS, (room, room))
    if sys.argv[1:] == ["dense"]:
        tuned["a"].factors("w.weight").dense()
    for budget in (1.4, 0.004):
        for residual, dtype in (("truncated", "auto"), ("full", "float32")):
            settings = MergeSettings(Budget(budget), residual=residual, factor_dtype=dtype)
            result = merge(TaskVectors(base, tuned), settings)
            print(result.ranks.experts["a"]["w.weight"], result.report.relative_error)
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux")
def test_memory_is_that_of_the_factors():
    """128 MB more than the program itself has to do for four task vectors of 8192 x 8192, which are 268 MB each."""
    command = [sys.executable, "-c", textwrap.dedent(MEMORY)]
    dense = subprocess.run([*command, "dense"], capture_output=True, text=True)
    assert dense.returncode and "memory" in dense.stderr
    found = subprocess.run(command, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    lines = [line.split() for line in found.stdout.splitlines()]
    assert lines[0][0] == "8" and len(lines) == 4
    assert all(float(error) < 1e-10 for _, error in lines[:2])
    assert all(0 < float(error) < 1 for _, error in lines[2:])


# --- pools ------------------------------------------------------------------------


def test_no_fine_tuned_model_is_instantiated(llamas, monkeypatch):
    _, models, pool = llamas
    stock = pool.load_model

    def load(name, *args, **kwargs):
        assert name == BASE, f"{name} was instantiated"
        return stock(name, *args, **kwargs)

    monkeypatch.setattr(pool, "load_model", load)
    assert_close(didi(pool, budget=1.4), models)


def test_adapters_and_checkpoints_in_one_pool(llamas):
    directory, models, _ = llamas
    models["svhn"].save_pretrained(directory / "whole")
    entries = {n: str(directory / n) for n in (BASE, *TASKS)}
    entries["svhn"] = str(directory / "whole")
    pool = CausalLMPool(entries, tokenizer=None)
    for choice in ({}, {"residual": "full"}, {"refinement": "adam"}):
        assert_close(didi(pool, budget=float("inf"), **choice), models)
    for residual in ("truncated", "full"):
        choice = {"budget": 0.1, "residual": residual, "refinement": "none"}
        one, two = didi(pool, **choice), didi(models, **choice)
        assert one.info["ranks"] == two.info["ranks"]
        assert_close(one, two, atol=1e-5)


def test_rank_of_an_adapter_is_kept_beside_a_checkpoint(llamas):
    """The checkpoint's task vector has noise in all directions, the adapters' have three of them."""
    directory, models, _ = llamas
    whole = copy.deepcopy(models["svhn"])
    with torch.no_grad():
        for name, value in whole.named_parameters():
            if "v_proj" in name:
                value += 0.01 * torch.randn(value.shape)
    whole.save_pretrained(directory / "whole")
    entries = {n: str(directory / n) for n in (BASE, *TASKS)}
    entries["svhn"] = str(directory / "whole")
    model = didi(CausalLMPool(entries, tokenizer=None), budget=2.5)
    for name, rank in model.info["ranks"]["experts"]["mnist"].items():
        assert rank == 3, name
    assert_close(model, {**models, "svhn": whole})


def test_adapters_around_a_base_model_in_memory(llamas):
    directory, models, _ = llamas
    entries = {BASE: models[BASE], **{t: str(directory / t) for t in TASKS}}
    assert_close(didi(entries, budget=1.4), models)


def test_prefix_of_the_base_models_names_may_differ(tmp_path):
    """An adapter of the bare tower, whose names lack the prefix that the pool's class has."""
    models = family(tmp_path, clip, target_modules=ATTENTION)
    for task in TASKS:
        change_tensors(
            tmp_path / task,
            lambda t: [
                t.update({n.replace("model.vision_model.", "model."): t.pop(n)})
                for n in list(t)
            ],
        )
    assert_close(didi(pool_of(tmp_path, models[BASE]), budget=1.4), models)


def test_pickled_adapter_is_read_weights_only(llamas, capsys):
    directory, models, pool = llamas
    file = directory / "svhn" / "adapter_model.safetensors"
    torch.save(load_file(file), file.with_suffix(".bin"))
    file.unlink()
    assert_close(didi(pool, budget=1.4), models)

    class Payload:
        def __reduce__(self):
            return (print, ("this must not run",))

    torch.save({"weight": Payload()}, file.with_suffix(".bin"))
    with pytest.raises(CheckpointMismatchError, match="weights-only checkpoint"):
        didi(pool)
    assert "must not run" not in capsys.readouterr().out


def test_order_of_adapters_changes_nothing(llamas):
    directory, models, _ = llamas
    for residual in ("truncated", "full"):
        merged = []
        for order in ((BASE, *TASKS), (*reversed(TASKS), BASE)):
            pool = CausalLMPool({n: str(directory / n) for n in order}, tokenizer=None)
            merged.append(didi(pool, budget=0.1, residual=residual))
        for task in TASKS:
            left, right = (floats(m.materialize(task)) for m in merged)
            assert same_bits(left, right)


def test_type_of_the_base_checkpoint_is_the_unit(tmp_path):
    models = family(tmp_path, lambda: llama().bfloat16(), target_modules=ATTENTION)
    pool = pool_of(tmp_path, models[BASE])
    kinds = {
        v.dtype
        for v in load_file(tmp_path / "svhn" / "adapter_model.safetensors").values()
    }
    assert kinds == {torch.float32}  # PEFT trains in float32
    model = didi(pool, budget=1.4, factor_dtype="float32")
    names = [
        n for n, _ in models[BASE].named_parameters() if any(a in n for a in ATTENTION)
    ]
    numbers = sum(models[BASE].get_parameter(n).numel() for n in names)
    assert model.storage.unit_bits == 16 * numbers
    assert didi(pool, budget=1.4, dry_run=True) is None


def test_tensors_that_no_adapter_changes_cost_nothing(llamas):
    directory, models, pool = llamas
    model = didi(pool, budget=0.1)
    assert model.touched and all(
        any(name in tensor for name in ATTENTION) for tensor in model.touched
    )


def test_adapter_that_was_never_trained_is_the_base_model(tmp_path):
    models = family(tmp_path, llama, target_modules=ATTENTION)
    change_tensors(
        tmp_path / "svhn",
        lambda t: [v.zero_() for n, v in t.items() if "lora_B" in n],
    )
    model = didi(pool_of(tmp_path, models[BASE]), budget=1.4)
    assert model.storage.expert_bits["svhn"] == 0
    assert same_bits(floats(model.materialize("svhn")), floats(models[BASE]))


def test_dry_run_reads_headers_and_knows_the_ranks(llamas, monkeypatch, capsys):
    _, _, pool = llamas
    monkeypatch.setattr(SafetensorsSource, "read", lambda *_: 1 / 0)
    monkeypatch.setattr(pool, "load_model", lambda *_: 1 / 0)
    assert didi(pool, budget=1.4, dry_run=True) is None
    plan = capsys.readouterr().out
    line = next(li for li in plan.splitlines() if "layers.1.self_attn.q_proj" in li)
    assert line.split()[1:4] == ["32", "x", "32"] and int(line.split()[-1]) <= 9
    assert "mlp" not in plan


def test_saved_model_comes_back(llamas, tmp_path):
    _, models, pool = llamas
    model = didi(pool, budget=0.2)
    model.save_pretrained(tmp_path / "out")
    loaded = DiDiModel.from_pretrained(tmp_path / "out")
    assert loaded.storage == model.storage
    for task in TASKS:
        left, right = floats(model.materialize(task)), floats(loaded.materialize(task))
        assert same_bits(left, right)
    assert model.info["parents"]["svhn"].endswith("svhn")


# --- other methods ----------------------------------------------------------------


@pytest.mark.parametrize(
    "make", [EMRMerging, FreeMerging, TallMaskMerging, TSVCompression, TwinMerging]
)
def test_other_methods_take_adapters_too(tmp_path, make):
    models = family(tmp_path, clip, target_modules=[*ATTENTION, "patch_embedding"])
    one = make().run(pool_of(tmp_path, models[BASE]))
    two = make().run(BaseModelPool(models))
    assert one.storage.unit_bits == two.storage.unit_bits
    assert one.storage.x_excl == pytest.approx(two.storage.x_excl, rel=0.02)
    # masks compare numbers that are nearly equal, and rounding decides for some entries
    for task in TASKS:
        found, expected = floats(one.materialize(task)), floats(two.materialize(task))
        for name, value in expected.items():
            far = (found[name] - value).abs() > 1e-5
            assert float(far.float().mean()) < 2e-3, name


def test_models_of_adapters_are_plain_models(tmp_path):
    """What methods of the host, and those that run the models, ask a pool for."""
    from fusion_bench.method import SimpleAverageAlgorithm

    models = family(tmp_path, clip, target_modules=ATTENTION)
    pool = adapted(pool_of(tmp_path, models[BASE]))
    assert isinstance(pool, CLIPVisionModelPool) and adapted(pool) is pool
    for name, model in pool.named_models():
        for tensor, value in floats(models[name]).items():
            torch.testing.assert_close(floats(model)[tensor], value)
    assert same_bits(floats(pool.load_pretrained_model()), floats(models[BASE]))
    average = floats(SimpleAverageAlgorithm().run(copy.copy(pool)))
    expected = floats(SimpleAverageAlgorithm().run(BaseModelPool(models)))
    for tensor, value in expected.items():
        torch.testing.assert_close(average[tensor], value)


# --- what cannot be merged --------------------------------------------------------


@pytest.mark.parametrize(
    "config, message",
    [
        ({"peft_type": "LOHA"}, "has peft_type='LOHA', expected 'LORA'"),
        ({"use_dora": True}, "has use_dora=True, expected none of it"),
        ({"lora_bias": True}, "has lora_bias=True"),
        ({"target_parameters": ["experts.up"]}, r"target_parameters=\['experts.up'\]"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights='pissa_niter_4'"),
        ({"r": 4}, r"lora_A.weight is \(3, 32\) and .*\(32, 3\), expected rank 4 of"),
    ],
    ids=str,
)
@pytest.mark.parametrize("dry_run", [True, False])
def test_other_kinds_of_adapters(llamas, config, message, dry_run, monkeypatch):
    directory, _, pool = llamas
    monkeypatch.setattr(SafetensorsSource, "read", lambda *_: 1 / 0)
    change_config(directory / "svhn", **config)
    with pytest.raises(CheckpointMismatchError, match="svhn: .*" + message) as caught:
        didi(pool, dry_run=dry_run)
    assert "merge_and_unload" in str(caught.value)
    assert "mnist" not in str(caught.value)


@pytest.mark.parametrize(
    "make, config, message",
    [
        (
            llama,
            {"target_modules": ["embed_tokens"]},
            "embed_tokens.lora_embedding_A is not of plain LoRA, expected lora_A.weight",
        ),
        (
            llama,
            {"target_modules": ATTENTION, "use_dora": True},
            "has use_dora=True",
        ),
        (
            OpenClipLike,
            {"target_modules": ["attn"]},
            "lora_A.weight belongs to an nn.MultiheadAttention",
        ),
    ],
    ids=["embedding", "dora", "fused attention"],
)
def test_adapters_that_peft_writes_and_we_refuse(tmp_path, make, config, message):
    models = family(tmp_path, make, **config)
    with pytest.raises(CheckpointMismatchError, match="svhn: .*" + message):
        didi(pool_of(tmp_path, models[BASE]))


def test_all_faults_of_all_adapters_come_in_one_error(llamas, monkeypatch):
    directory, models, pool = llamas
    monkeypatch.setattr(SafetensorsSource, "read", lambda *_: 1 / 0)
    first = "base_model.model.model.layers.0.self_attn."

    def narrow(tensors):
        tensors[f"{first}q_proj.lora_A.weight"] = torch.ones(3, 16)
        tensors["base_model.model.model.extra"] = torch.ones(3)

    change_tensors(directory / "mnist", lambda t: t.pop(f"{first}v_proj.lora_B.weight"))
    change_tensors(directory / "svhn", narrow)
    change_config(directory / "eurosat", use_dora=True)
    with pytest.raises(CheckpointMismatchError) as caught:
        didi(pool)
    message = str(caught.value)
    assert f"mnist: {first}v_proj.lora_A.weight stands alone" in message
    name = "model.layers.0.self_attn.q_proj.weight"
    assert f"svhn: {name} is (32, 16), the base model has (32, 32)" in message
    assert "svhn: 1 tensors that the base model _pretrained_ does not have" in message
    assert "eurosat: adapter_config.json has use_dora=True" in message


def test_faulty_tensors_may_be_left_out(llamas):
    directory, models, pool = llamas
    key = "base_model.model.model.layers.0.self_attn.v_proj.lora_B.weight"
    change_tensors(directory / "mnist", lambda t: t.pop(key))
    model = didi(pool, budget=1.4, exclude=["*layers.0.self_attn.v_proj*"])
    assert "model.layers.0.self_attn.v_proj.weight" not in model.touched


def test_adapter_of_another_model(llamas):
    directory, _, pool = llamas
    other = family(directory / "other", clip, target_modules=ATTENTION)
    pool._models["svhn"] = str(directory / "other" / "svhn")
    with pytest.raises(CheckpointMismatchError, match="svhn: 4 tensors that the base"):
        didi(pool)
    del other


@pytest.mark.parametrize("name", ["lora_A", "lora_B"])
def test_adapter_that_is_not_finite(llamas, name):
    directory, _, pool = llamas

    def damage(tensors):
        key = f"base_model.model.model.layers.1.self_attn.q_proj.{name}.weight"
        tensors[key][1, 2] = float("nan")

    change_tensors(directory / "svhn", damage)
    tensor = "model.layers.1.self_attn.q_proj.weight"
    expected = rf"svhn: {tensor} \(1 entries of lora_A and lora_B\)"
    with pytest.raises(NonFiniteError, match=expected):
        didi(pool)


@pytest.mark.parametrize(
    "sizes", [(1e17, 1.0), (1.0, 1e18), (1e19, 1e19), (1e25, 1e25)]
)
@pytest.mark.parametrize("settings", [{}, {"budget": 0.3}, {"factor_dtype": "float32"}])
def test_adapter_beyond_what_can_be_calculated_is_named(llamas, sizes, settings):
    directory, _, pool = llamas
    change_tensors(directory / "svhn", lambda tensors: scale_query(tensors, *sizes))
    with pytest.raises(
        NonFiniteError, match=rf"svhn: {QUERY} \(a change of norm \d+e\+"
    ):
        didi(pool, **settings)


@pytest.mark.parametrize("sizes", [(1e20, 1e-20), (1e-30, 1e28), (1e-12, 1e12)])
def test_adapter_of_uneven_factors_is_its_product(llamas, sizes):
    """However its norm is shared out between the factors: what PEFT applies is finite."""
    directory, models, pool = llamas
    change_tensors(directory / "svhn", lambda tensors: scale_query(tensors, *sizes))
    ratio = torch.tensor(sizes[0] * sizes[1])
    change = models["svhn"].get_parameter(QUERY) - models[BASE].get_parameter(QUERY)
    for settings in ({}, {"budget": 0.3}, {"factor_dtype": "float32"}):
        built = didi(pool, **settings).materialize("svhn").get_parameter(QUERY)
        found = (built - models[BASE].get_parameter(QUERY)).detach()
        if not settings:
            assert (found - change * ratio).norm() < 0.03 * found.norm()
        assert found.isfinite().all()


@pytest.mark.parametrize("sizes", [(1e-35, 1e-35), (1e-44, 1.0), (0.0, 1e30)])
def test_adapter_of_less_than_any_weight_notices_is_the_base_model(llamas, sizes):
    directory, models, pool = llamas
    change_tensors(directory / "svhn", lambda tensors: scale_query(tensors, *sizes))
    for settings in ({}, {"budget": 0.3}, {"factor_dtype": "float32"}):
        model = didi(pool, **settings)
        built = model.materialize("svhn").get_parameter(QUERY)
        assert torch.allclose(built, models[BASE].get_parameter(QUERY), atol=1e-20)
        assert model.info["tensors"]["svhn"]["equal to the base model"] >= 1


def scale_query(tensors, a: float, b: float) -> None:
    """Set the sizes of the two factors of one weight."""
    for name, size in (("lora_A", a), ("lora_B", b)):
        key = f"base_model.model.{QUERY}".replace("weight", f"{name}.weight")
        tensors[key] = tensors[key] * size


def test_base_model_under_adapters_that_is_not_finite(llamas):
    directory, models, _ = llamas
    tensor = "model.layers.1.self_attn.q_proj.weight"
    with torch.no_grad():
        models[BASE].get_parameter(tensor)[0, 0] = float("inf")
    entries = {BASE: models[BASE], **{t: str(directory / t) for t in TASKS}}
    with pytest.raises(NonFiniteError, match=f"the base model _pretrained_: {tensor}"):
        didi(entries)


@pytest.mark.parametrize("missing", ["adapter_model.safetensors", "config"])
def test_incomplete_adapter(llamas, missing):
    directory, _, pool = llamas
    if missing == "config":
        (directory / "svhn" / "adapter_config.json").write_text("{")
        expected = "svhn: .*adapter_config.json is not the configuration of an adapter"
    else:
        (directory / "svhn" / missing).unlink()
        expected = "svhn: .* has adapter_config.json but neither adapter_model.safe"
    with pytest.raises(CheckpointMismatchError, match=expected):
        didi(pool)


def test_damaged_adapter(llamas):
    directory, _, pool = llamas
    file = directory / "svhn" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(CheckpointMismatchError, match="not a whole safetensors file"):
        didi(pool)


@pytest.mark.parametrize("dry_run", [True, False])
def test_base_model_must_not_be_an_adapter(llamas, dry_run):
    directory, _, pool = llamas
    pool._models[BASE] = str(directory / "mnist")
    with pytest.raises(ModelPoolError, match="'_pretrained_' is an adapter: .*mnist"):
        didi(pool, dry_run=dry_run)
