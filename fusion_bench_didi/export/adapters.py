"""One task of a merged model as a LoRA adapter in PEFT's files."""

from collections.abc import Mapping
from dataclasses import replace
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
from .modules import Refusal, Site
from .report import Carried
from .settings import EIGHT_BITS, AdapterSettings

_OTHER_SHAPE = "of another shape or type than the base model's"
_LINEAR_ALONE = "servers read adapters of linear layers alone"
_FOR_PEFT = "; carry=all is for PEFT"
_WHOLE_FOR_PEFT = "; carry=all holds it whole, for PEFT"


class Adapter:
    """One task of a merged model as an adapter of a base model.

    Args:
        under: the model that it is of: the base model of the merge, or that with the shared part in it.
        found: weights of the base model that take factors, and those that do not, see :func:`.modules.sites`.
    """

    def __init__(
        self,
        model: DynamicModel,
        task: str,
        settings: AdapterSettings,
        under: nn.Module,
        found: tuple[Mapping[str, Site], Mapping[str, Refusal]],
    ):
        self.model, self.task, self.settings, self.under = model, task, settings, under
        self.expert = model.modulators[task]
        sites, self.refused = found
        self._sited = sites.keys()
        every = settings.carry == "all"
        self.sites = {n: s for n, s in sites.items() if every or s.kind == "linear"}
        self.carried: dict[str, Carried] = {}  # by tensor
        self._factors: dict[str, tuple[Site, LowRankFactors]] = {}  # by module
        self._scale: float = 1  # of all their products
        self._whole: dict[str, Tensor] = {}  # by name in the file
        self._modules: set[str] = set()  # that are whole
        self._biases = False
        self._fill()

    def write(self, place: Path, source: Mapping[str, str]) -> dict[str, Carried]:
        """Write the files into a new directory; how each tensor that the merged model changes is carried.

        Raises:
            DiDiError: if there is nothing to carry, or nothing as factors.
        """
        if not self._factors:
            if self._whole:
                raise DiDiError(
                    f"All that {self.task} changes would be carried whole, and PEFT reads no adapter without a pair of factors. Export "
                    "it as plain or patch."
                )
            ways = {one.why for one in self.carried.values() if one.why}
            if not self._has_pairs():  # with carry=all neither
                ways = {w.replace(_FOR_PEFT, "").replace(_WHOLE_FOR_PEFT, "") for w in ways}  # fmt: skip
            raise DiDiError(
                f"Nothing that {self.task} changes is in a layer that an adapter of carry={self.settings.carry} is for"
                f"{': ' if ways else ''}{'; '.join(sorted(ways))}. Export it as plain or patch."
            )
        place.mkdir()
        self._config(source).save_pretrained(place)
        tensors = dict(self._whole)
        for site, factors in self._factors.values():
            for part, value in site.layout(factors).items():
                tensors[f"{PREFIX}{site.module}.{part}"] = value
        tensors = {name: independent(tensors[name]) for name in sorted(tensors)}
        save_file(tensors, place / FILES[0], metadata={"format": "pt"})
        return self.carried

    def _has_pairs(self) -> bool:
        """Whether something that the task changes has a pair of factors where all is carried."""
        changes = (self._wanted(n)[0] for n in self.model.touched if n in self._sited)
        return any(change is not None and bool(change.any()) for change in changes)

    def _fill(self) -> None:
        names = self.model.touched
        # modules that are whole hold their biases
        for name in sorted(names, key=lambda n: (n not in self.sites, _is_bias(n))):
            wanted, size = self._wanted(name)
            if wanted is None:
                found = Carried("left out", 1.0, why=_OTHER_SHAPE)
            elif not bool(wanted.any()):
                found = Carried("base")
            elif name in self.sites:
                found = self._add_factors(name, wanted, size)
            else:
                found = self._add_whole(name, wanted, size)
            self.carried[name] = found
        if self.settings.pad_rank and self._factors:
            rank = max(factors.rank for _, factors in self._factors.values())
            for module, (site, factors) in self._factors.items():
                self._factors[module] = site, _padded(factors, rank)
        if self.settings.factor_dtype == EIGHT_BITS:
            self._round()

    def _round(self) -> None:
        """Round factors to 8 bits, and say what each loses."""
        dtype = getattr(torch, EIGHT_BITS)
        products = {module: factors for module, (_, factors) in self._factors.items()}
        rounded, self._scale = in_eight_bits(products, dtype)
        for name, one in self.carried.items():
            site = self.sites.get(name)
            if one.how != "factors" or site.module not in rounded:
                continue
            self._factors[site.module] = site, rounded[site.module]
            wanted, size = self._wanted(name)
            read = rounded[site.module].to(torch.float32).dense() * self._scale
            error = norm(wanted - read) / size if size else 0.0
            why = "; ".join(filter(None, (one.why, "rounded to 8 bits")))
            self.carried[name] = replace(one, error=error, why=why)

    def _add_factors(self, name: str, wanted: Tensor, size: float) -> Carried:
        """Add the factors of a weight, of what :meth:`_wanted` gives."""
        dtype, limit = self.settings.dtype(self.under), self.settings.limit
        found = fitted(wanted, self._product(name), max_rank=limit, dtype=dtype)
        if rank := found.factors.rank:
            site = self.sites[name]
            self._factors[site.module] = site, found.factors
        error = found.lost / size if size else 0.0
        why = f"cut to rank {rank}" if found.cut else ""
        return Carried("factors", error, rank, why)

    def _add_whole(self, name: str, wanted: Tensor, size: float) -> Carried:
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
        if _is_bias(name) and owner not in self._modules:
            layer = f"{owner}.base_layer" if owner in self._factors else owner
            self._biases = True
            self._whole[f"{PREFIX}{layer}.{leaf}"] = self._value(name)
            return Carried("whole")
        for module in tied or (owner,):
            self._modules.add(module)
            for other in self.under.get_submodule(module).state_dict():
                same = name if tied and other == leaf else f"{module}.{other}"
                self._whole[f"{PREFIX}{module}.{other}"] = self._value(same)
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
            if refusal:
                return refusal.why + _WHOLE_FOR_PEFT
            return _LINEAR_ALONE + _FOR_PEFT
        if not owner or [*self.under.get_submodule(owner).children()]:
            return "of a module with others inside, which PEFT does not replace"
        parent = self.under.get_submodule(owner.rpartition(".")[0])
        if isinstance(parent, nn.MultiheadAttention):
            return "in fused attention, of which PEFT replaces no layer"
        return ""

    def _value(self, name: str) -> Tensor:
        """A tensor as ``materialize`` has it, a copy: files hold no two names of one."""
        value = base = tensor_of(self.under, name).detach()
        if name in self.model.touched:
            value = self.model.task_tensor(name, self.expert)
        return value.to(base.dtype, copy=True)

    def _wanted(self, name: str) -> tuple[Tensor | None, float]:
        """The change that the adapter has to add to a tensor, as a matrix, and the norm of the task's whole change.

        The first is None for tensors of a task's own that cannot be added to the base model's. For a task that keeps the base
        model's tensor the second is the norm of the first, which takes back what all tasks share.
        """
        base = self.model.base_tensor(name)
        value = self.model.task_tensor(name, self.expert)
        under = tensor_of(self.under, name).detach()
        if value.shape != under.shape or not value.is_floating_point():
            return None, 0.0
        # what the base model's type rounds away is no change
        rounded = value.to(under.dtype)
        same = torch.equal(rounded, under)
        rest = torch.zeros_like(value) if same else value.float() - under.float()
        whole = rest if torch.equal(rounded, base) else value.float() - base.float()
        return rest.reshape(matrix_shape(rest.shape)), norm(whole)

    def _product(self, name: str) -> LowRankFactors | None:
        """That change as the stored product of factors, if it is one."""
        delta: Delta | None = self.expert.deltas.get(name)
        shared: Delta | None = self.model.shared.get(name)
        if isinstance(delta, OwnDelta):
            return None
        if self.settings.shared == "fold":
            return None if delta is None else delta.beyond_product(shared)
        last, below = last_of(delta, shared)
        return None if last is None else last.product(below)

    def _config(self, source: Mapping[str, str]) -> Any:
        from peft import LoraConfig, TaskType

        # a name may be the end of another: the longer ones are asked first
        modules = sorted(self._factors, key=lambda name: (-len(name), name))
        ranks = {name: self._factors[name][1].rank for name in modules}
        rank = max(ranks.values())
        # PEFT's class for them takes text first; models that take images run in its plain one
        under, main = self.under, getattr(self.under, "main_input_name", "input_ids")
        generates = hasattr(under, "prepare_inputs_for_generation")
        encoder = getattr(getattr(under, "config", None), "is_encoder_decoder", False)
        causal = generates and main == "input_ids" and not encoder
        config = LoraConfig(
            r=rank,
            lora_alpha=rank * self._scale,
            target_modules=modules,
            rank_pattern=ranks,
            alpha_pattern={name: r * self._scale for name, r in ranks.items()},
            fan_in_fan_out=any(map(is_conv1d, map(under.get_submodule, modules))),
            lora_dropout=0.0,
            bias="all" if self._biases else "none",
            modules_to_save=sorted(self._modules) or None,
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
