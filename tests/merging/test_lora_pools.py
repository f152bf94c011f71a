"""LoRA adapters in place of fine-tuned checkpoints: the same models as after PEFT's own merging, merged as factors."""

import copy
import functools
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from fusion_bench.modelpool import BaseModelPool, CausalLMPool
from helpers import (
    BASE,
    OpenClipLike,
    combinations,
    didi,
    floats,
    merge_settings,
    same_bits,
)
from lora_families import (
    ATTENTION,
    TASKS,
    assert_close,
    change_tensors,
    clip,
    family,
    llama,
    llamas,
    pool_of,
    write_adapter,
)
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from fusion_bench_didi.errors import CheckpointMismatchError
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
from fusion_bench_didi.task_vectors.file_sources import SafetensorsSource

# PEFT on what it saves beside the adapter, and on layouts that it corrects itself.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft")


def gpt2(tied: bool = True) -> nn.Module:
    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": 30}
    config = GPT2Config(**sizes, n_positions=8, tie_word_embeddings=tied)
    return GPT2LMHeadModel(config)


#: What PEFT can do to a model, by model, as factors.
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
    "llama, patterns with anchors": (
        llama,
        {
            "target_modules": "all-linear",
            "exclude_modules": ["layers.0.self_attn.q_proj"],
            "init_lora_weights": "orthogonal",
            "r": 4,
            "rank_pattern": {r"^model.layers.1.self_attn.v_proj": 2},
            "alpha_pattern": {"q_proj|k_proj": 11, r"(?<=layers\.0\.)mlp.*": -3.5},
        },
    ),
    "llama, head and norm": (
        llama,
        {"target_modules": ATTENTION, "modules_to_save": ["lm_head", "norm"]},
    ),
    "llama, head as pair": (llama, {"target_modules": ["q_proj", "lm_head"]}),
    "llama, embedding": (
        llama,
        {"target_modules": ["q_proj", "embed_tokens"], "rank_pattern": {"embed.*": 5}},
    ),
    "clip": (clip, {"target_modules": [*ATTENTION, "fc1", "patch_embedding"]}),
    "clip, biases": (clip, {"target_modules": ["fc1"], "bias": "all"}),
    "clip, biases and a norm": (
        clip,
        {
            "target_modules": ["fc1"],
            "bias": "all",
            "modules_to_save": ["post_layernorm"],
        },
    ),
    "gpt2": (gpt2, {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    "gpt2, embeddings of tokens and places": (
        lambda: gpt2(tied=False),
        {"target_modules": ["wte", "wpe", "c_attn"], "fan_in_fan_out": True},
    ),
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

#: What gives rows other norms, so that no change is one of factors.
DORA: dict[str, tuple[Any, dict]] = {
    "llama, dora, patterns and root": (
        llama,
        {
            "target_modules": [*ATTENTION, "embed_tokens"],
            "rank_pattern": {"v_proj": 2},
            "alpha_pattern": {"layers.1.self_attn.v_proj": 9, "embed.*": 0.05},
            "use_rslora": True,
            "use_dora": True,
            "modules_to_save": ["norm"],
        },
    ),
    "gpt2, dora": (
        gpt2,
        {
            "target_modules": ["c_attn", "c_proj"],
            "fan_in_fan_out": True,
            "use_dora": True,
        },
    ),
    "clip, dora": (
        clip,
        {"target_modules": ["v_proj", "patch_embedding"], "use_dora": True},
    ),
}


@pytest.fixture(scope="session", params=[*KINDS, *DORA])
def kind(request, tmp_path_factory):
    """A directory of adapters, and the whole models."""
    make, config = {**KINDS, **DORA}[request.param]
    directory = tmp_path_factory.mktemp("adapters")
    return directory, family(directory, make, **config)


def test_a_matrix_of_adapters_can_be_kept_as_each_task_has_it(tmp_path):
    wholes = family(tmp_path, llama, target_modules=ATTENTION)
    base = LlamaForCausalLM.from_pretrained(tmp_path / BASE)
    model = didi(pool_of(tmp_path, base), own=["*q_proj*"], budget=4.0)
    name = "model.layers.0.self_attn.q_proj.weight"
    for task in TASKS:
        kept, right = (
            m.get_parameter(name) for m in (model.materialize(task), wholes[task])
        )
        assert torch.allclose(kept, right, atol=1e-6)


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("held", [True, False])
def test_factors_of_a_grown_vocabulary_change_the_value_beside_them(
    tmp_path, held, dora
):
    """PEFT writes that too; where it is not there, the base model's is of another size."""
    models = family(tmp_path, llama, tasks=("plain",), target_modules=ATTENTION)
    grown = copy.deepcopy(models[BASE])
    grown.resize_token_embeddings(44)
    targets = ["embed_tokens", "lm_head"]
    config = {"target_modules": targets, "use_dora": dora}
    whole = write_adapter(grown, tmp_path / "grown", 5, **config)
    if not held:

        def forget(tensors: dict) -> None:
            for key in [key for key in tensors if ".base_layer." in key]:
                del tensors[key]

        change_tensors(tmp_path / "grown", forget)
    pool = pool_of(tmp_path, models[BASE], ("plain", "grown"))
    own = {"own": ["*embed_tokens*", "*lm_head*"]}
    if not held:
        with pytest.raises(CheckpointMismatchError, match="does not hold the value"):
            didi(pool, budget=50, **own)
        return
    model = didi(pool, budget=50, **own)
    assert_close(model, {"plain": models["plain"], "grown": whole})
    told = model.info["tensors"]["grown"]
    assert not told["not taken from the checkpoint"]


@pytest.mark.parametrize("dora", [False, True])
def test_a_head_that_no_file_holds_is_not_changed_by_factors(tmp_path, dora):
    """It is random at every load: what the adapter was trained on is not there."""
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    whole = BertForSequenceClassification(
        BertConfig(**sizes, num_attention_heads=2, vocab_size=30)
    )
    whole.bert.save_pretrained(tmp_path / BASE)
    for task in "ab":
        targets = ["query", "classifier"]
        config = LoraConfig(r=2, target_modules=targets, use_dora=dora)
        get_peft_model(copy.deepcopy(whole), config).save_pretrained(tmp_path / task)
    target = "transformers.BertForSequenceClassification.from_pretrained"
    pool = {
        n: {"_target_": target, "pretrained_model_name_or_path": str(tmp_path / n)}
        for n in (BASE, "a", "b")
    }
    with pytest.raises(
        CheckpointMismatchError,
        match="a: classifier.weight is .*random at every load.*modules_to_save",
    ):
        didi(BaseModelPool(pool))


def test_every_task_comes_back_whatever_peft_did(kind):
    directory, models = kind
    model = didi(pool_of(directory, models[BASE]), budget=float("inf"))
    assert_close(model, models)


@pytest.mark.parametrize("kind", KINDS, indirect=True)
@pytest.mark.parametrize(
    "shared, allocation", [("mean", "uniform"), ("ties", "greedy")]
)
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


@pytest.mark.parametrize("budget, residual", [(0.07, "full"), (0.12, "truncated")])
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


@pytest.mark.parametrize(
    "choice",
    combinations(
        allocation=["learned"],
        budget=[0.01, 0.02, 0.05],
        factor_dtype=["auto", "int4", "float32"],
        residual=["truncated", "full"],
        refinement=["alternating", "adam"],
    ),
)
def test_no_product_is_formed(tmp_path, monkeypatch, choice):
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
    result = merge(vectors, merge_settings(**choice))
    assert 0 < result.storage.x_excl <= choice["budget"]
    assert 0 < result.report.relative_error < 1 + 1e-6


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
    stock = functools.wraps(pool.load_model)
    monkeypatch.setattr(pool, "load_model", stock(lambda *_: 1 / 0))
    assert didi(pool, budget=1.4, dry_run=True) is None
    plan = capsys.readouterr().out
    line = next(li for li in plan.splitlines() if "layers.*.self_attn.q_proj" in li)
    assert line.split()[1:5] == ["2", "32", "x", "32"] and int(line.split()[-1]) <= 9
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


class OneInput(OpenClipLike):
    """A layer whose weight is a single column."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(1, 40)


@pytest.mark.parametrize("budget", [0.3, float("inf")])
def test_adapters_of_a_layer_of_one_input_are_merged(tmp_path, budget):
    models = family(tmp_path, OneInput, target_modules=["gate"])
    model = didi(
        pool_of(tmp_path, models[BASE]),
        budget=budget,
        factor_dtype="auto",
        allocation="greedy",
    )
    assert model.storage.x_excl <= budget
    if budget == float("inf"):
        assert_close(model, models, names=["gate.weight"])
