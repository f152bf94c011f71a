"""One task of a merged model as a LoRA adapter in PEFT's files."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ..checkpoint.tensors import independent
from ..deltas.base import Delta, last_of
from ..deltas.plain import OwnDelta
from ..errors import DiDiError
from ..lowrank.factors import LowRankFactors
from ..models.dynamic import DynamicModel
from ..task_vectors.layers import is_conv1d
from ..task_vectors.lora_adapter import FILES, PREFIX
from ..task_vectors.tensor import matrix_shape
from ..task_vectors.ties import tensor_of
from .factors import fitted, in_eight_bits, norm
from .modules import Refusal, Site, sites
from .report import Carried
from .settings import EIGHT_BITS, AdapterSettings

_OTHER_SHAPE = "of another shape or type than the base model's"
_BY_PEFT_ALONE = "servers read adapters of linear layers alone; carry=all is for PEFT"
_WHOLE_FOR_PEFT = "carry=all holds it whole, for PEFT"


@dataclass
class _Content:
    """Content of an adapter: factors by module, whole tensors by their names in the file."""

    parts: dict[str, tuple[Site, LowRankFactors]] = field(default_factory=dict)
    whole: dict[str, Tensor] = field(default_factory=dict)
    modules: set[str] = field(default_factory=set)
    biases: bool = False
    carried: dict[str, Carried] = field(default_factory=dict)
    scale: float = 1  # of all products


class AdapterWriter:
    """Writes tasks of one merged model as adapters of one base model.

    Args:
        before: the base model of the merge.
        under: the model that adapters are of; ``before``, or that with the shared part in it.
    """

    def __init__(
        self,
        model: DynamicModel,
        settings: AdapterSettings,
        before: nn.Module,
        under: nn.Module,
    ):
        self.model, self.settings, self.under = model, settings, under
        self.sites, self.refused = sites(before)
        self.dtype = settings.dtype(under)  # in which factors are fitted

    def write(
        self, task: str, place: Path, source: Mapping[str, str]
    ) -> dict[str, Carried]:
        """Write a task's adapter; how each of its tensors is carried.

        Raises:
            DiDiError: if it carries nothing, or nothing as factors.
        """
        content = self._content(task)
        if not content.parts:
            if content.whole:
                raise DiDiError(
                    f"All that {task} changes would be carried whole, and PEFT reads no adapter without a pair of factors. Export "
                    "it as plain or patch."
                )
            ways = sorted({c.why for c in content.carried.values() if c.why})
            raise DiDiError(
                f"Nothing that {task} changes is in a layer that an adapter of carry={self.settings.carry} is for"
                f"{': ' if ways else ''}{'; '.join(ways)}. Export it as plain or patch."
            )
        place.mkdir()
        self._config(content, source).save_pretrained(place)
        tensors = dict(content.whole)
        for site, factors in content.parts.values():
            for part, value in site.layout(factors).items():
                tensors[f"{PREFIX}{site.module}.{part}"] = value
        tensors = {name: independent(tensors[name]) for name in sorted(tensors)}
        save_file(tensors, place / FILES[0], metadata={"format": "pt"})
        return content.carried

    def _content(self, task: str) -> _Content:
        content, every = _Content(), self.settings.carry == "all"
        sites = {n: s for n, s in self.sites.items() if every or s.kind == "linear"}
        # modules that are whole hold their biases
        order = sorted(self.model.touched, key=lambda n: (n not in sites, _is_bias(n)))
        for name in order:
            wanted, size = self._wanted(task, name)
            if wanted is None:
                found = Carried("left out", 1.0, why=_OTHER_SHAPE)
            elif not bool(wanted.any()):
                found = Carried("base")
            elif name in sites:
                found = self._factors(task, name, wanted, size, content)
            else:
                found = self._whole(task, name, wanted, size, content)
            content.carried[name] = found
        if self.settings.pad_rank and content.parts:
            rank = max(factors.rank for _, factors in content.parts.values())
            for module, (site, factors) in content.parts.items():
                content.parts[module] = site, _padded(factors, rank)
        if self.settings.factor_dtype == EIGHT_BITS:
            self._round(task, content)
        return content

    def _round(self, task: str, content: _Content) -> None:
        """Round factors to 8 bits, and say what each loses."""
        dtype = getattr(torch, EIGHT_BITS)
        products = {module: factors for module, (_, factors) in content.parts.items()}
        rounded, content.scale = in_eight_bits(products, dtype)
        for name, one in content.carried.items():
            site = self.sites.get(name)
            if one.how != "factors" or site.module not in rounded:
                continue
            content.parts[site.module] = site, rounded[site.module]
            wanted, size = self._wanted(task, name)
            read = rounded[site.module].to(torch.float32).dense() * content.scale
            error = norm(wanted - read) / size if size else 0.0
            why = "; ".join(filter(None, (one.why, "rounded to 8 bits")))
            content.carried[name] = replace(one, error=error, why=why)

    def _factors(
        self, task: str, name: str, wanted: Tensor, size: float, content: _Content
    ) -> Carried:
        """Add the factors of a weight, of what :meth:`_wanted` gives."""
        site = self.sites[name]
        product, limit = self._product(task, name), self.settings.limit
        found = fitted(wanted, product, max_rank=limit, dtype=self.dtype)
        if rank := found.factors.rank:
            content.parts[site.module] = site, found.factors
        error = found.lost / size if size else 0.0
        why = f"cut to rank {rank}" if found.cut else ""
        return Carried("factors", error, rank, why)

    def _whole(
        self, task: str, name: str, wanted: Tensor, size: float, content: _Content
    ) -> Carried:
        """Add a tensor that has no factors, where PEFT carries it; nothing where it does not."""
        owner, _, leaf = name.rpartition(".")
        tied = self.refused.get(name, Refusal("")).together
        if why := self._why_not(name):
            if self.settings.shared == "concat" and self._all_share(name):
                why += "; with shared=fold the base model has it"
            if self.settings.shared == "fold" and name in self.model.shared:
                why += "; what tasks share stays in it"
            lost = norm(wanted) / size if size else 1.0
            return Carried("left out", lost, why=why)
        if _is_bias(name) and owner not in content.modules:
            layer = f"{owner}.base_layer" if owner in content.parts else owner
            content.biases = True
            content.whole[f"{PREFIX}{layer}.{leaf}"] = self._value(task, name)
            return Carried("whole")
        for module in tied or (owner,):
            content.modules.add(module)
            for other in self.under.get_submodule(module).state_dict():
                same = name if tied and other == leaf else f"{module}.{other}"
                content.whole[f"{PREFIX}{module}.{other}"] = self._value(task, same)
        return Carried("whole")

    def _all_share(self, name: str) -> bool:
        """Whether a tensor's change is the same for all tasks."""
        experts = self.model.modulators.values()
        return name in self.model.shared and not any(name in e.deltas for e in experts)

    def _why_not(self, name: str) -> str:
        """Why a tensor without factors cannot be carried; empty if it can."""
        refusal, owner = self.refused.get(name), name.rpartition(".")[0]
        if refusal and not refusal.together:
            return refusal.why
        if self.settings.carry == "linear":
            return f"{refusal.why}; {_WHOLE_FOR_PEFT}" if refusal else _BY_PEFT_ALONE
        if not owner or [*self.under.get_submodule(owner).children()]:
            return "of a module with others inside, which PEFT does not replace"
        parent = self.under.get_submodule(owner.rpartition(".")[0])
        if isinstance(parent, nn.MultiheadAttention):
            return "in fused attention, of which PEFT replaces no layer"
        return ""

    def _value(self, task: str, name: str) -> Tensor:
        """A tensor as ``materialize`` has it, a copy: files hold no two names of one."""
        value = base = tensor_of(self.under, name).detach()
        if name in self.model.touched:
            value = self.model.task_tensor(name, self.model.modulators[task])
        return value.to(base.dtype, copy=True)

    def _wanted(self, task: str, name: str) -> tuple[Tensor | None, float]:
        """The change that the adapter has to add to a tensor, as a matrix, and the norm of the task's whole change.

        The first is None for tensors of a task's own that cannot be added to the base model's. For a task that keeps the base
        model's tensor the second is the norm of the first, which takes back what all tasks share.
        """
        expert, base = self.model.modulators[task], self.model.base_tensor(name)
        value = self.model.task_tensor(name, expert)
        under = tensor_of(self.under, name).detach()
        if value.shape != under.shape or not value.is_floating_point():
            return None, 0.0
        # what the base model's type rounds away is no change
        rounded = value.to(under.dtype)
        same = torch.equal(rounded, under)
        rest = torch.zeros_like(value) if same else value.float() - under.float()
        whole = rest if torch.equal(rounded, base) else value.float() - base.float()
        return rest.reshape(matrix_shape(rest.shape)), norm(whole)

    def _product(self, task: str, name: str) -> LowRankFactors | None:
        """That change as the stored product of factors, if it is one."""
        delta: Delta | None = self.model.modulators[task].deltas.get(name)
        shared: Delta | None = self.model.shared.get(name)
        if isinstance(delta, OwnDelta):
            return None
        if self.settings.shared == "fold":
            return None if delta is None else delta.beyond_product(shared)
        last, below = last_of(delta, shared)
        return None if last is None else last.product(below)

    def _config(self, content: _Content, source: Mapping[str, str]) -> Any:
        from peft import LoraConfig, TaskType

        # a name may be the end of another: the longer ones are asked first
        modules = sorted(content.parts, key=lambda name: (-len(name), name))
        ranks = {name: content.parts[name][1].rank for name in modules}
        rank = max(ranks.values())
        # PEFT's class for them takes text first; models that take images run in its plain one
        under, main = self.under, getattr(self.under, "main_input_name", "input_ids")
        generates = hasattr(under, "prepare_inputs_for_generation")
        encoder = getattr(getattr(under, "config", None), "is_encoder_decoder", False)
        causal = generates and main == "input_ids" and not encoder
        config = LoraConfig(
            r=rank,
            lora_alpha=rank * content.scale,
            target_modules=modules,
            rank_pattern=ranks,
            alpha_pattern={name: r * content.scale for name, r in ranks.items()},
            fan_in_fan_out=any(map(is_conv1d, map(under.get_submodule, modules))),
            lora_dropout=0.0,
            bias="all" if content.biases else "none",
            modules_to_save=sorted(content.modules) or None,
            task_type=TaskType.CAUSAL_LM if causal else None,
            base_model_name_or_path=source.get("place"),
            revision=source.get("revision"),
            inference_mode=True,
        )
        # of a set, each run writes another file
        config.target_modules = sorted(modules)
        return config


def _is_bias(name: str) -> bool:
    return name.rpartition(".")[2] == "bias"


def _padded(factors: LowRankFactors, rank: int) -> LowRankFactors:
    """A product of factors padded by zero directions to a rank."""
    extra, pad = rank - factors.rank, nn.functional.pad
    up, down = pad(factors.up, (0, extra)), pad(factors.down, (0, 0, 0, extra))
    return LowRankFactors(up, down)
