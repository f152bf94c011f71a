"""Any dynamic method with a router: the merged model finds the task of every sample itself.

Example:

    fusion_bench method=didi/routed modelpool=didi/demo taskpool=didi/demo
    fusion_bench method=didi/routed method@method.base_method=didi/twin method.router=mlp ...
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from fusion_bench import auto_register_config
from fusion_bench.modelpool import BaseModelPool
from fusion_bench.utils import instantiate

from ..errors import SettingsError, spelled
from ..models.dynamic import DynamicModel
from ..options import Aliases, Fraction, ImageCount, Positive, Seed, refuse_idle
from ..pools.inputs import Inputs, load_inputs, parts, require_inputs
from ..routers.base import Router
from ..routers.files import make_router
from ..taskpool.task_switching import attach
from .base import PoolMethod

log = logging.getLogger(__name__)
BATCH = 256
#: settings of what a router's head is fitted to
OF_HEADS = ("images", "seed")
_OF_ROUTERS = ("hard", "temperature", "fallback", "threshold", "head", *OF_HEADS, "router_options")  # fmt: skip


@auto_register_config
class RoutedMethod(PoolMethod):
    """The result of ``base_method`` with a router attached; stock task pools then evaluate it without the task.

    Training-free where ``head`` is none. Otherwise the router's head is fitted to features of ``images`` images per task
    of the model pool's train (or validation) datasets; class labels are not used. ``router_options`` go to the router's class.
    """

    title = "Routed"

    def __init__(
        self,
        base_method: Any = None,
        router: Literal[
            "projection", "representation", "mlp", "oracle", "none"
        ] = "projection",
        hard: bool = True,
        temperature: Positive = 1.0,
        fallback: Literal["none", "shared"] = "none",
        threshold: Fraction = 0.0,
        head: Literal["none", "discriminant", "mlp"] | None = None,
        images: ImageCount = 500,
        seed: Seed = 0,
        router_options: Mapping[str, Any] | None = None,
        task_aliases: Aliases = None,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        self.routes = router not in ("none", "oracle")
        router = check_router(lambda: self._router(["one", "other"]))
        if router is None:
            of = f"of a router, and router={self.router}"
            refuse_idle(self, dict.fromkeys(_OF_ROUTERS, of))
        elif router.head == "none":
            refuse_idle(self, dict.fromkeys(OF_HEADS, "of a head, and there is none"))

    def run(self, modelpool: Any) -> DynamicModel:
        """Merge by the base method, then attach the router.

        Raises:
            SettingsError: if the base method is none whose result has experts; before the merge, if its class tells.
            ModelPoolError: if images are needed and the pool has none; before the merge.
        """
        modelpool = self.checked(modelpool)
        base = instantiated(self.base_method, self)
        if makes_experts(base) is False:
            raise _without_experts(f"is {type(base).__name__}, whose result")
        router = self._router(modelpool.model_names)
        if router is not None:
            check_head(router, modelpool, self.task_aliases)
        model = base.run(modelpool)
        if not isinstance(model, DynamicModel):
            raise _without_experts(f"gives a {type(model).__name__}, which")
        if router is None:
            return model
        attach_router(self, model, router, modelpool)
        if self.taskpool is not None:
            attach(self.taskpool, known=model.tasks, aliases=self.task_aliases)
        return model

    def _router(self, tasks: list[str]) -> Router | None:
        options = dict(self.router_options or {})
        if self.head is not None:
            options["head"] = self.head
        if self.router in ("oracle", "none"):
            return None  # the task is set from outside
        return make_router(
            self.router,
            list(tasks),
            hard=self.hard,
            temperature=self.temperature,
            fallback=self.fallback,
            threshold=self.threshold,
            **options,
        )


def check_router(make: Callable[[], Router | None]) -> Router | None:
    """What is made as the router, which must be one that can be made.

    Raises:
        SettingsError: if it cannot.
    """
    try:
        return make()
    except (TypeError, ValueError) as error:
        raise SettingsError(f"There is no such router: {error}") from error


def instantiated(method: Any, owner: Any) -> Any:
    """A method from its configuration (or as it is), under the program, on the device and with the task aliases of its owner.

    Raises:
        SettingsError: if there is none, or it is none, or would only tell what it would do.
    """
    if method is None:
        raise SettingsError("base_method is missing: give a method's configuration.")
    if isinstance(method, Mapping) or "_target_" in getattr(method, "keys", list)():
        method = instantiate(method)
    if not callable(getattr(method, "run", None)):
        raise SettingsError(
            f"base_method is {method!r}, expected a method's configuration, or a method. Choose another one by its name with "
            "fusion_bench: method@method.base_method=didi/s."
        )
    if getattr(method, "dry_run", False):
        raise SettingsError(
            f"dry_run leaves no model for {owner.title} to go on with. Set it to false, or run {type(method).__name__} by itself."
        )
    method._program = owner._program
    if getattr(method, "_fabric_instance", owner) is None:
        method._fabric_instance = owner.fabric
    if hasattr(method, "routes"):
        method.routes = owner.routes
    if hasattr(method, "task_aliases") and owner.task_aliases:
        method.task_aliases = {**owner.task_aliases, **(method.task_aliases or {})}
    return method


def makes_experts(method: Any) -> bool | None:
    """Whether the result of a method is a model with experts, by its class; None where only the result tells."""
    if isinstance(method, PoolMethod):
        return method.dynamic
    package = type(method).__module__.partition(".")[0]
    return False if package in ("fusion_bench", "fusion_bench_didi") else None


def _without_experts(found: str) -> SettingsError:
    return SettingsError(
        f"base_method {found} holds no experts to route to. Choose a dynamic method, didi for instance."
    )


def check_head(
    router: Router, modelpool: BaseModelPool, aliases: Mapping[str, str] | None
) -> None:
    """A router with a head needs images of every task.

    Raises:
        ModelPoolError: naming the tasks without any.
    """
    if router.head != "none":
        require_inputs(
            modelpool,
            aliases,
            purpose="The router's head is fitted to unlabelled data",
            otherwise=f", or choose a training-free router: {spelled('router', 'projection')} {spelled('head', 'none')}",
        )


@torch.no_grad()
def attach_router(
    method: Any, model: DynamicModel, router: Router, modelpool: BaseModelPool
) -> None:
    """Put a method's router on its model, its head fitted to images of the pool.

    Args:
        method: has ``images`` (per task), ``seed`` and ``task_aliases``.
    """
    router.tasks = model.tasks
    model.attach_router(router)
    if router.head != "none":
        with method.profile("fit router"):
            inputs = [
                load_inputs(
                    modelpool,
                    task,
                    method.images,
                    seed=method.seed,
                    aliases=method.task_aliases,
                )
                for task in model.tasks
            ]
            fit_router_to(model, inputs, seed=method.seed)
    model.info["router"] = router.report()


@torch.no_grad()
def fit_router_to(
    model: DynamicModel, inputs: Sequence[Inputs], *, seed: int = 0
) -> None:
    """Fit the head of the attached router to one batch of inputs per task, in the order of ``model.tasks``."""
    router = model.router
    device = next(model.backbone.parameters()).device
    model.eval()
    features = [
        torch.cat(
            [
                router.features(
                    model,
                    *(x.to(device) for x in args),
                    **{key: x.to(device) for key, x in named.items()},
                )
                for args, named in parts(batch, BATCH)
            ]
        )
        for batch in inputs
    ]
    counts = torch.tensor([len(part) for part in features])
    labels = torch.arange(len(features)).repeat_interleave(counts).to(device)
    options = {"seed": seed} if router.head == "mlp" else {}
    router.fit(torch.cat(features), labels, **options)
