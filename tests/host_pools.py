"""Every model pool of the host on small random models on disk, with the task pool that the host has for it."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import torch
from exact_models import SIDES, seeded, tokens
from fusion_bench import modelpool as pools
from fusion_bench.compat import modelpool as old_pools
from fusion_bench.modelpool import BaseModelPool
from helpers import BASE, fine_tuned, pictures, write_clip
from omegaconf import OmegaConf
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from torch.utils.data import DataLoader
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    ConvNextConfig,
    ConvNextForImageClassification,
    ConvNextImageProcessor,
    Dinov2Config,
    Dinov2ForImageClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
    ResNetConfig,
    ResNetForImageClassification,
    T5Config,
    T5ForConditionalGeneration,
)

from fusion_bench_didi.taskpool import TextClassificationTaskPool

#: Names that the host has class names or data sets for.
IMAGE_TASKS, TEXT_TASKS = ("mnist", "svhn"), ("cola", "rte")
SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
}
PIXELS = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@dataclass(frozen=True)
class HostPool:
    """One row of the table.

    Args:
        models: base model and fine-tuned models by name.
        open: the host's pool on a directory in which every model has its own.
        inputs: arguments of a forward of four samples.
        taskpool: the host's task pool for such models, on a directory and the model pool; None where the host has none.
    """

    models: Callable[[], dict[str, nn.Module]]
    open: Callable[[Path], Any]
    inputs: Mapping[str, torch.Tensor] | tuple[torch.Tensor, ...]
    taskpool: Callable[[Path, Any], Any] | None = None

    @property
    def needs(self) -> tuple[str, ...]:
        """Libraries of the task pool that may be missing."""
        return ("lm_eval",) if self.taskpool is _lm_eval_tasks else ()

    def write(self, place: Path) -> Any:
        """The models on disk, as the host's pool."""
        for name, model in self.models().items():
            if hasattr(model, "save_pretrained"):
                model.save_pretrained(place / name)
                if hasattr(model.config, "vocab_size"):
                    tokenizer().save_pretrained(place / name)
            else:
                (place / name).mkdir(parents=True)
                torch.save(model.state_dict(), place / name / "state.pt")
        return self.open(place)


def _family(make: Callable[[], nn.Module], tasks=IMAGE_TASKS) -> Callable:
    def build() -> dict[str, nn.Module]:
        base = seeded(make)
        tuned = {t: fine_tuned(base, i, scale=0.2) for i, t in enumerate(tasks, 1)}
        for seed, model in enumerate(tuned.values(), 1):
            for name, statistic in model.named_buffers():
                if "running_" in name:
                    statistic.add_(0.3 * seed)
        return {BASE: base, **tuned}

    return build


def tokenizer() -> PreTrainedTokenizerFast:
    """A token per printable character."""
    words = ["<pad>", "<unk>", "<eos>", *map(chr, range(33, 33 + 61))]
    made = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, "<unk>"))
    made.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token="<pad>",
        unk_token="<unk>",
        eos_token="<eos>",
        model_max_length=64,
    )


# --- models --------------------------------------------------------------------------


def _clip() -> nn.Module:
    sides = {"image_size": 32, "patch_size": 8, "projection_dim": 16}
    return CLIPVisionModel(CLIPVisionConfig(**SMALL, **sides))


def _llama() -> nn.Module:
    return LlamaForCausalLM(LlamaConfig(**SMALL, **SIDES, num_key_value_heads=2))


def _llama_classifier() -> nn.Module:
    config = LlamaConfig(**SMALL, **SIDES, num_labels=3)
    return LlamaForSequenceClassification(config)


def _gpt2() -> nn.Module:
    sides = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
    config = GPT2Config(**sides, **SIDES, num_labels=2)
    return GPT2ForSequenceClassification(config)


def _t5() -> nn.Module:
    sides = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    config = T5Config(**sides, **SIDES, decoder_start_token_id=0, eos_token_id=2)
    return T5ForConditionalGeneration(config)


def _resnet() -> nn.Module:
    sides = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}
    return ResNetForImageClassification(
        ResNetConfig(**sides, layer_type="basic", num_labels=10)
    )


def _convnext() -> nn.Module:
    sides = {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2}
    return ConvNextForImageClassification(ConvNextConfig(**sides, num_labels=10))


def _dinov2() -> nn.Module:
    sides = {"image_size": 32, "patch_size": 8, "mlp_ratio": 2, "num_labels": 10}
    return Dinov2ForImageClassification(Dinov2Config(**SMALL, **sides))


class Encoder(nn.Module):
    """The host's wrapper around an OpenCLIP tower, of a size that it does not know by name."""

    def __init__(self, state_dict_path: str | None = None):
        super().__init__()
        import open_clip

        self.model = open_clip.CLIP(
            embed_dim=16,
            vision_cfg={"image_size": 32, "layers": 2, "width": 64, "patch_size": 8},
            text_cfg={"context_length": 8, "vocab_size": 64, "width": 16, "heads": 2, "layers": 1},
        )  # fmt: skip
        del self.model.transformer
        self.train_preprocess = self.val_preprocess = nn.Identity()
        if state_dict_path is not None:
            self.load_state_dict(torch.load(state_dict_path, weights_only=True))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.model.encode_image(images)


# --- pools ---------------------------------------------------------------------------


def _entries(place: Path, entry: Callable[[str], Any] = str) -> dict[str, Any]:
    names = sorted(p.name for p in place.iterdir() if (p / "config.json").is_file() or (p / "state.pt").is_file())  # fmt: skip
    return {name: entry(str(place / name)) for name in names}


def _target(cls: str, **more: Any) -> Callable[[str], dict[str, Any]]:
    return lambda path: {
        "_target_": f"transformers.{cls}.from_pretrained",
        "pretrained_model_name_or_path": path,
        **more,
    }


def _causal(entry=str, kind=pools.CausalLMPool, **options: Any) -> Callable:
    return lambda place: kind(
        _entries(place, entry), tokenizer=str(place / BASE), **options
    )


def _image_pool(kind, **options: Any) -> Callable:
    return lambda place: kind(
        models=_entries(place, lambda path: {"config_path": path}), **options
    )


def _listed(kind: type) -> Callable:
    """A pool of version 0.1."""

    def opened(place: Path) -> Any:
        listed = [{"name": n, "path": p} for n, p in _entries(place).items()]
        return kind(OmegaConf.create({"models": listed}))

    return opened


def _openclip(place: Path) -> Any:
    target = {"_target_": f"{__name__}.Encoder"}
    entry = lambda path: {**target, "state_dict_path": f"{path}/state.pt"}  # noqa: E731
    return pools.OpenCLIPVisionModelPool(_entries(place, entry))


def _lazy(place: Path) -> Any:
    from fusion_bench.modelpool.lazy_state_dict_pool import LazyStateDictPool

    return LazyStateDictPool(_entries(place))


def _gpt2_pool(place: Path) -> Any:
    return pools.GPT2ForSequenceClassificationPool(
        models=OmegaConf.create(_entries(place, _target("GPT2Model"))),
        tokenizer=_tokenizer_entry(place),
    )


def _tokenizer_entry(place: Path) -> Any:
    target = "transformers.PreTrainedTokenizerFast.from_pretrained"
    where = {"pretrained_model_name_or_path": str(place / BASE)}
    return OmegaConf.create({"_target_": target, **where})


# --- task pools ----------------------------------------------------------------------


def _clip_tasks(place: Path, modelpool: Any) -> Any:
    from fusion_bench.taskpool import CLIPVisionModelTaskPool

    whole = place / "clip"
    if not whole.exists():
        write_clip(whole, modelpool.load_model(BASE))
    return CLIPVisionModelTaskPool(
        test_datasets={t: pictures(i) for i, t in enumerate(IMAGE_TASKS)},
        processor=str(whole),
        clip_model=str(whole),
        dataloader_kwargs={"batch_size": 6},
    )


def _openclip_tasks(place: Path, modelpool: Any) -> Any:
    from fusion_bench.models.open_clip import ClassificationHead
    from fusion_bench.taskpool import OpenCLIPVisionModelTaskPool

    items = [(image, i) for i, image in enumerate(PIXELS)]
    head = torch.randn(5, 16, generator=torch.Generator().manual_seed(1))
    return _with_program(
        OpenCLIPVisionModelTaskPool(
            test_datasets=dict.fromkeys(IMAGE_TASKS, items),
            classification_heads=dict.fromkeys(
                IMAGE_TASKS, ClassificationHead(True, head)
            ),
            dataloader_kwargs={"batch_size": 2},
        ),
        SimpleNamespace(test_processor=None),
    )


def _image_tasks(place: Path, modelpool: Any) -> Any:
    from fusion_bench.taskpool.image_classification import ImageClassificationTaskPool

    processor = ConvNextImageProcessor(size={"shortest_edge": 32})
    return ImageClassificationTaskPool(
        test_datasets={t: pictures(i) for i, t in enumerate(IMAGE_TASKS)},
        processor=lambda image: processor(image, return_tensors="pt")["pixel_values"][0],  # fmt: skip
        dataloader_kwargs={"batch_size": 6},
    )


def _gpt2_tasks(place: Path, modelpool: Any) -> Any:
    from fusion_bench.taskpool import GPT2TextClassificationTaskPool

    pool = GPT2TextClassificationTaskPool(
        test_datasets=dict.fromkeys(TEXT_TASKS),
        tokenizer=_tokenizer_entry(place),
        dataloader_kwargs={},
        fast_dev_run=False,
    )
    ids = tokens(8, 6)
    rows = [
        {"input_ids": t, "attention_mask": torch.ones_like(t), "labels": t[0] % 2}
        for t in ids
    ]
    loader = DataLoader(rows, batch_size=1)
    pool.get_test_dataloader = lambda task: pool.fabric.setup_dataloaders(loader)
    return _with_program(pool, modelpool)


def _t5_tasks(place: Path, modelpool: Any) -> Any:
    """The host's pool, its data given instead of downloaded."""
    from fusion_bench.compat.taskpool.flan_t5_glue_text_generation import (
        FlanT5GLUETextGenerationTaskPool,
    )

    task = {"dataset": {"name": "cola", "split": "validation"}}
    config = {
        "tasks": [{"name": name, **task} for name in TEXT_TASKS],
        "tokenizer": str(place / BASE),
        "batch_size": 4,
        "num_workers": 0,
        "cache_dir": str(place / "cache"),
    }
    pool = FlanT5GLUETextGenerationTaskPool(OmegaConf.create(config))
    ids = tokens(8, 6)
    rows = [
        {"input_ids": t, "attention_mask": torch.ones_like(t), "labels": t[:2]}
        for t in ids
    ]
    stock = pool.load_task

    def load_task(name: str) -> Any:
        task = stock(name)
        task.__dict__["test_dataset"] = rows
        return task

    pool.load_task = load_task
    return pool


def _lm_eval_tasks(place: Path, modelpool: Any) -> Any:
    """lm-eval's harness on two tasks of local files."""
    from fusion_bench.taskpool import LMEvalHarnessTaskPool

    for seed, task in enumerate(TEXT_TASKS):
        write_lm_eval_task(place / "tasks", task, seed)
    return LMEvalHarnessTaskPool(
        tasks=list(TEXT_TASKS),
        include_path=str(place / "tasks"),
        batch_size=4,
        output_path=str(place / "results"),
    )


def write_lm_eval_task(place: Path, task: str, seed: int) -> None:
    """Multiple choice between continuations of a few letters."""
    place.mkdir(parents=True, exist_ok=True)
    letters = tokenizer().batch_decode(tokens(12, 8, seed=seed))
    rows = [
        {"text": text[:5], "choices": [text[5:7], text[7:9]], "label": i % 2}
        for i, text in enumerate(t.replace(" ", "") for t in letters)
    ]
    data = place / f"{task}.json"
    data.write_text("\n".join(map(json.dumps, rows)))
    config = {
        "task": task,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "output_type": "multiple_choice",
        "test_split": "test",
        "doc_to_text": "{{text}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "label",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc"}],
    }
    (place / f"{task}.yaml").write_text(json.dumps(config))


def _text_tasks(place: Path, modelpool: Any) -> Any:
    """Ours, as the host has none."""
    for seed, task in enumerate(TEXT_TASKS):
        (place / "data" / task).mkdir(parents=True, exist_ok=True)
        texts = tokenizer().batch_decode(tokens(12, 6, seed=seed))
        rows = {"text": texts, "label": [i % 3 for i in range(12)]}
        pd.DataFrame(rows).to_parquet(place / "data" / task / "test-0.parquet")
    return TextClassificationTaskPool(str(place / "data"), str(place / BASE))


def _with_program(taskpool: Any, modelpool: Any) -> Any:
    taskpool._program = SimpleNamespace(modelpool=modelpool, taskpool=taskpool)
    return taskpool


# --- the rows ------------------------------------------------------------------------

TEXT = {"input_ids": tokens(4, 6), "attention_mask": torch.ones(4, 6).long()}
TO_TEXT = {**TEXT, "decoder_input_ids": tokens(4, 3, seed=1)}
_LLAMA, _T5 = _family(_llama, TEXT_TASKS), _family(_t5, TEXT_TASKS)
HOST_POOLS: dict[str, HostPool] = {
    "CLIPVisionModelPool": HostPool(
        _family(_clip),
        lambda place: pools.CLIPVisionModelPool(_entries(place)),
        (PIXELS,),
        _clip_tasks,
    ),
    "OpenCLIPVisionModelPool": HostPool(
        _family(Encoder), _openclip, (PIXELS,), _openclip_tasks
    ),
    "CausalLMPool": HostPool(_LLAMA, _causal(), TEXT, _lm_eval_tasks),
    "CausalLMPool, `_target_`": HostPool(
        _LLAMA, _causal(_target("AutoModelForCausalLM")), TEXT, _lm_eval_tasks
    ),
    "CausalLMPool, no `_target_`": HostPool(
        _LLAMA,
        _causal(lambda path: {"pretrained_model_name_or_path": path}),
        TEXT,
        _lm_eval_tasks,
    ),
    "CausalLMPool, bfloat16": HostPool(
        _LLAMA, _causal(model_kwargs={"torch_dtype": "bfloat16"}), TEXT, _lm_eval_tasks
    ),
    "CausalLMPool, lazy": HostPool(
        _LLAMA, _causal(enable_lazy_loading=True), TEXT, _lm_eval_tasks
    ),
    "CausalLMBackbonePool": HostPool(
        _LLAMA, _causal(kind=pools.CausalLMBackbonePool), (), None
    ),
    "LazyStateDictPool": HostPool(_LLAMA, _lazy, TEXT, None),
    "Seq2SeqLMPool": HostPool(
        _T5,
        lambda place: pools.Seq2SeqLMPool(
            OmegaConf.create(_entries(place, _target("AutoModelForSeq2SeqLM"))),
            tokenizer=None,
        ),
        TO_TEXT,
        _t5_tasks,
    ),
    "AutoModelForSeq2SeqLMPool (0.1)": HostPool(
        _T5, _listed(old_pools.AutoModelForSeq2SeqLMPool), TO_TEXT, _t5_tasks
    ),
    "SequenceClassificationModelPool": HostPool(
        _family(_llama_classifier, TEXT_TASKS),
        lambda place: pools.SequenceClassificationModelPool(
            _entries(place, _target("AutoModelForSequenceClassification")),
            tokenizer=None,
        ),
        TEXT,
        _text_tasks,
    ),
    "GPT2ForSequenceClassificationPool": HostPool(
        _family(_gpt2, TEXT_TASKS), _gpt2_pool, TEXT, _gpt2_tasks
    ),
    "ConvNextForImageClassificationPool": HostPool(
        _family(_convnext),
        _image_pool(pools.ConvNextForImageClassificationPool),
        (PIXELS,),
        _image_tasks,
    ),
    "Dinov2ForImageClassificationPool": HostPool(
        _family(_dinov2),
        _image_pool(pools.Dinov2ForImageClassificationPool),
        (PIXELS,),
        _image_tasks,
    ),
    "ResNetForImageClassificationPool": HostPool(
        _family(_resnet),
        _image_pool(pools.ResNetForImageClassificationPool, type="transformers"),
        (PIXELS,),
        _image_tasks,
    ),
    "HuggingFaceClipVisionPool (0.1)": HostPool(
        _family(_clip),
        _listed(old_pools.HuggingFaceClipVisionPool),
        (PIXELS,),
        _clip_tasks,
    ),
    "AutoModelPool (0.1)": HostPool(_LLAMA, _listed(pools.AutoModelPool), TEXT, None),
    "BaseModelPool, `AutoModel`": HostPool(
        _LLAMA,
        lambda place: BaseModelPool(_entries(place, _target("AutoModel"))),
        TEXT,
        None,
    ),
    "BaseModelPool, modules": HostPool(
        _LLAMA,
        lambda place: BaseModelPool(
            {n: LlamaForCausalLM.from_pretrained(p) for n, p in _entries(place).items()}
        ),
        TEXT,
        _lm_eval_tasks,
    ),
}
