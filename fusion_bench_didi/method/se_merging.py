"""SE-Merging (Chen et al., "SE-Merging: A Self-Enhanced Approach for Dynamic Model Merging", arXiv 2506.18135).

Example:

    fusion_bench method=didi/se_merging modelpool=didi/demo taskpool=didi/demo
    fusion_bench method=didi/se_merging method@method.base_method=ties_merging method.experts=didi ...
"""

import copy
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from fusion_bench import auto_register_config
from fusion_bench.modelpool import BaseModelPool
from torch import Tensor, nn

from ..deltas.plain import DenseDelta, OwnDelta
from ..deltas.sink import EncodedTensor, InMemory
from ..errors import SettingsError, spelled
from ..merging.encoding import keep_own
from ..models.dynamic import DynamicModel
from ..options import (
    Aliases,
    Fraction,
    ImageCount,
    Patterns,
    Positive,
    Scale,
    Seed,
    not_at_default,
    refuse_idle,
)
from ..routers.representation import RepresentationRouter
from ..task_vectors.live_models import all_tensors
from ..task_vectors.scan import model_bits, scan
from .base import PoolMethod
from .didi import DiDiMerging
from .routed import (
    OF_HEADS,
    attach_router,
    check_head,
    check_router,
    instantiated,
    makes_experts,
)

log = logging.getLogger(__name__)


@auto_register_config
class SEMerging(PoolMethod):
    """Coefficients of a static merge, rescaled for every sample by what the merged model makes of it.

    For a merged model ``theta_m`` and experts ``theta_t = theta_0 + tau_t``, h the states at a layer,

    ``d_t(x) = || h_m(x) - h_t(x) ||``, ``s(x) = softmax(-d(x) / temperature)``, ``theta(x) = theta_0 + mass * sum_t s_t(x) tau_t``.

    Hard: the nearest expert alone. Every sample costs T + 1 forwards to the layer and one mixed forward; stored are the
    backbone and T task vectors (x_incl = 1 + T). With ``experts: didi`` the task vectors are those of its low-rank modules,
    in the static merge too (x_incl = 1 + budget). The merged model itself costs nothing where it is a multiple of the
    sum of the task vectors (averaging, task arithmetic), and one model more elsewhere (TIES, TSV-M); the account says
    which.

    Source: a reconstruction from the abstract; body and code of the paper were not at hand, and no figure of it was
    reproduced. Inferred, hence options: layer (last block),
    first token, L2, distances divided by their mean over tasks, temperature, total mass 1 (the coefficients of
    averaging sum to 1, those of task arithmetic to 0.3 T), soft or hard; that tau_t are the plain task vectors also where
    the static merge trims or rotates them. Ours: ``prefer: far``, and ``head``, which fits a classifier to
    the distances on unlabelled images.
    """

    title = "SE-Merging"
    routes = True

    def __init__(
        self,
        base_method: Any = None,
        experts: Literal["individuals", "didi"] = "individuals",
        didi: Mapping[str, Any] | None = None,
        layers: Sequence[int | str] = (-1,),
        pooling: Literal["cls", "mean"] = "cls",
        distance: Literal["l2", "cosine"] = "l2",
        normalization: Literal["none", "mean", "minmax"] = "mean",
        prefer: Literal["near", "far"] = "near",
        assignment: Literal["soft", "hard"] = "soft",
        temperature: Positive = 0.1,
        total_mass: Scale = 1.0,
        fallback: Literal["none", "shared"] = "none",
        threshold: Fraction = 0.0,
        head: Literal["none", "discriminant", "mlp"] = "none",
        images: ImageCount = 500,
        seed: Seed = 0,
        exclude: Patterns = (),
        task_aliases: Aliases = None,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        check_router(lambda: self.router(["one", "other"]))
        refuse_idle(self, dict(self._idle()))
        if self.experts != "didi" and (given := self._chosen()):
            raise SettingsError(
                f"didi ({', '.join(given)}) is of experts=didi, not {self.experts}. Leave it out, or set {spelled('experts', 'didi')}."
            )

    def run(self, modelpool: Any) -> DynamicModel:
        """The experts with SE-Merging's router attached.

        Raises:
            SettingsError: if the base method gives no static model; before the experts, if its class tells.
            ModelPoolError: if ``head`` needs images and the pool has none.
        """
        modelpool = self.checked(modelpool)
        base = instantiated(self.base_method, self)
        if makes_experts(base):
            raise _not_static(f"is {type(base).__name__}, whose result holds experts")
        router = self.router(modelpool.model_names)
        check_head(router, modelpool, self.task_aliases)
        with self.profile("experts"):
            if self.experts == "didi":
                model = self._slim(modelpool)
            else:
                model = self._individuals(modelpool)
        with self.profile("static merge"):
            if self.experts == "didi" or owned(model):
                merged = static_merge(base, with_experts(modelpool, model))
            else:
                merged = static_merge(base, modelpool)
        weights, rest = as_multiple(model, merged)
        if rest is None:
            router.merged_shared, router.merged_weight = weights
        else:
            router.anchor(rest)
        attach_router(self, model, router, modelpool)
        return self.connect(model, modelpool)

    def router(self, tasks: Sequence[str]) -> RepresentationRouter:
        """The router of the configuration."""
        return RepresentationRouter(
            list(tasks),
            layers=self.layers,
            pooling=self.pooling,
            distance=self.distance,
            normalization=self.normalization,
            prefer=self.prefer,
            total_mass=self.total_mass,
            hard=self.assignment == "hard",
            temperature=self.temperature,
            fallback=self.fallback,
            threshold=self.threshold,
            head=self.head,
        )

    def told_settings(self) -> dict[str, Any]:
        """A base method that was given as an object is named by its class."""
        found = super().told_settings()
        base = found.get("base_method")
        if not isinstance(base, (Mapping, str, type(None))):
            found["base_method"] = type(base).__name__
        return found

    def _idle(self) -> Iterator[tuple[str, str]]:
        """Settings that nothing reads, and what they are of."""
        if self.head == "none":
            yield from dict.fromkeys(OF_HEADS, "of a head, and head=none").items()
        else:
            of = f"of distances that are compared as they are, and head={self.head}"
            yield from dict.fromkeys(("normalization", "prefer"), of).items()
        if self.fallback == "none":
            yield "threshold", "of fallback=shared, not none"
            if self.assignment == "hard":
                yield "temperature", "of soft weights or a fallback, and there are none"
        elif not self.threshold:
            yield "fallback", "of samples below a threshold, and threshold=0"

    def _chosen(self) -> list[str]:
        """Settings of ``didi`` that are not at their default."""
        return not_at_default(DiDiMerging, self.didi or {})

    def _slim(self, modelpool: BaseModelPool) -> DynamicModel:
        settings = {k: v for k, v in (self.didi or {}).items() if k != "_target_"}
        method = DiDiMerging(**{"exclude": self.exclude, **settings})
        return instantiated(method, self).run(modelpool)

    @torch.no_grad()
    def _individuals(self, modelpool: BaseModelPool) -> DynamicModel:
        """Whole task vectors, in the checkpoints' data type."""
        backbone, vectors = self.opened(modelpool)
        facts = self.facts(modelpool, backbone, vectors)
        found = scan(vectors, self.fabric.device)
        sink = InMemory(vectors.tasks)
        own = keep_own(vectors, found.changed_own, sink)
        for name in self.track(found.changed, "task vectors"):
            dtype, shape = vectors.tuned_dtype(name), vectors.infos[name].shape
            deltas = [DenseDelta(shape, v.to(dtype)) for v in vectors.read(name)]
            sink.put(EncodedTensor(name, None, deltas))
        _, experts = sink.close([*own, *found.changed])
        return DynamicModel(
            backbone,
            {},
            {task: experts[task] for task in modelpool.model_names},
            unit_bits=sum(model_bits(vectors, found).values()),
            info=facts,
        )


def static_merge(method: Any, modelpool: BaseModelPool) -> nn.Module:
    """The static merge by a method.

    Raises:
        SettingsError: if it is not one plain model.
    """
    merged = method.run(with_own_modules(modelpool))
    if not isinstance(merged, nn.Module) or hasattr(merged, "modulators"):
        raise _not_static(f"gives a {type(merged).__name__}")
    return merged


def _not_static(found: str) -> SettingsError:
    return SettingsError(
        f"base_method {found}; SE-Merging starts from one static model. Choose averaging, task arithmetic, TIES or TSV-M."
    )


def with_own_modules(modelpool: BaseModelPool) -> BaseModelPool:
    """The pool, with copies of models that lie in memory: some of the host's methods overwrite them."""
    pool, entries = copy.copy(modelpool), dict(modelpool._models.items())
    own = {n: copy.deepcopy(e) for n, e in entries.items() if isinstance(e, nn.Module)}
    if own:
        pool._models = entries | own
    return pool


def owned(model: DynamicModel) -> list[str]:
    """Names of the tensors that some task keeps as its own, so that nothing is merged of them."""
    experts = list(model.modulators.values())
    return [
        name
        for name in model.touched
        if any(isinstance(e.deltas.get(name), OwnDelta) for e in experts)
    ]


def with_experts(modelpool: BaseModelPool, model: DynamicModel) -> BaseModelPool:
    """The pool with the experts of a model in place of the fine-tuned models; what only a task has is as in the base model."""
    pool, own = with_own_modules(modelpool), owned(model)
    stock = pool.load_model

    def load_model(name: Any, *args: Any, **kwargs: Any) -> nn.Module:
        if name in model.tasks:
            return model.materialize(name, as_base=own)
        return stock(name, *args, **kwargs)

    pool.load_model = load_model
    return pool


#: Relative error up to which a static merge counts as a multiple of what is stored.
_TOLERANCE = 1e-3


@torch.no_grad()
def as_multiple(
    model: DynamicModel, merged: nn.Module
) -> tuple[tuple[float, float], dict[str, Tensor] | None]:
    """Write a static merge as ``base + a shared + c sum_t E_t``, if it is of that form.

    That is so for averaging (a = 1, c = 1 / T) and task arithmetic (a = its scale times T, c = its scale).

    Returns:
        ((a, c), None), or ((1, 0), the change of every tensor).
    """
    state = all_tensors(merged)
    changes: dict[str, Tensor] = {}
    gram = torch.zeros(3, 3, dtype=torch.float64)  # of shared, experts, merged
    experts, own = list(model.modulators.values()), set(owned(model))
    for name in model.touched:
        if name in own:
            continue
        base = model.base_tensor(name).float()
        changes[name] = state[name].detach().to(base) - base
        delta = model.shared.get(name)
        shared = torch.zeros_like(base) if delta is None else delta.change().to(base)
        values = (model.task_tensor(name, expert) for expert in experts)
        total = sum(value - base - shared for value in values)
        rows = torch.stack([shared, total, changes[name]]).flatten(1).double()
        gram += (rows @ rows.mT).cpu()
    weights = torch.linalg.pinv(gram[:2, :2]) @ gram[:2, 2]
    left = gram[2, 2] - weights @ gram[:2, 2]
    if left > _TOLERANCE**2 * gram[2, 2]:
        return (1.0, 0.0), changes
    a, c = weights.tolist()
    as_it_is = not len(model.shared) or abs(a - 1) < _TOLERANCE
    return (1.0 if as_it_is else a, c), None
