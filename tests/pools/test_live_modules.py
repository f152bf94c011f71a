"""Modules in memory that compute something else than the base model with the same tensors: named, not run as the base model."""

import copy
import functools
import re
import threading
import types
from types import SimpleNamespace

import pytest
import torch
import torchmetrics
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from accelerate.utils import convert_outputs_to_fp32
from exact_models import llama
from fusion_bench.modelpool import BaseModelPool
from helpers import BASE, didi, family, fine_tuned
from peft import (
    IA3Config,
    LoHaConfig,
    LoraConfig,
    PrefixTuningConfig,
    PromptTuningConfig,
    get_peft_model,
)
from torch import nn
from transformers import LlamaForCausalLM

from fusion_bench_didi.errors import CheckpointMismatchError, ModelPoolError
from fusion_bench_didi.pools.live_modules import check_modules
from fusion_bench_didi.pools.opening import open_pool


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
        self.drop, self.norm = nn.Dropout(0.1), nn.LayerNorm(4)
        self.head = nn.Linear(4, 3)
        self.temperature, self.best_loss, self.run = 1.0, 0.3, "first"
        self.val_acc, self.epoch = 0.5, 1.0
        self.register_buffer("mean", torch.ones(3, 1, 1), persistent=False)

    def forward(self, x):
        x = self.body(x * self.mean).mean((2, 3))
        return self.head(self.norm(self.drop(x))) / self.temperature


class Hotter(Net):
    def forward(self, x):
        return 2 * super().forward(x)


class Renamed(Net):
    """Of another class, and computes the same."""


def changed(net: Net, how: str) -> Net:
    if how == "buffer":
        net.mean += 0.5
    elif how == "class":
        net.__class__ = Hotter
    elif how == "activation":
        net.body[2] = nn.GELU()
    elif how == "float":
        net.temperature = 2.0
    elif how == "epsilon":
        net.norm.eps = 0.1
    elif how == "stride":
        net.body[0].stride = (2, 2)
    elif how == "statistics":
        net.body[1].momentum, net.body[1].eps = 0.5, 0.1
    elif how == "one more":
        net.body.append(nn.Tanh())
    elif how == "one less":
        del net.body[2]
    elif how == "forward":
        plain = net.forward
        net.forward = lambda x: -plain(x)
    return net


LOST = {
    "buffer": "the buffer mean, which is in no state dict",
    "class": r"the model is .*Net != .*Hotter",
    "activation": r"body\.2 is .*ReLU != .*GELU",
    "float": "temperature 1.0 != 2.0",
    "epsilon": "norm: eps 1e-05 != 0.1",
    "stride": r"body\.0: stride \(1, 1\) != \(2, 2\)",
    "statistics": r"body\.1: eps 1e-05 != 0.1",
    "one more": r"body\.3 .*Tanh.* is in the fine-tuned model only",
    "one less": r"body\.2 .*ReLU.* is in the base model only",
    "forward": "the model has a forward of its own",
}


@pytest.mark.parametrize("how", LOST)
def test_what_a_task_would_lose_is_named(how):
    pool = family(Net())
    changed(pool["svhn"], how)
    with pytest.raises(CheckpointMismatchError, match=f"svhn: .*{LOST[how]}"):
        didi(pool)


@pytest.mark.parametrize("how", LOST)
def test_what_all_have_in_common_is_kept(how):
    pool = {name: changed(net, how) for name, net in family(Net()).items()}
    pool = {name: net.eval() for name, net in pool.items()}
    model, x = didi(pool, budget=1e6).eval(), torch.randn(2, 3, 6, 6)
    for task in model.tasks:
        model.set_task(task)
        torch.testing.assert_close(model(x), pool[task](x))


def harmless(net: Net, how: str) -> None:
    if how == "training":
        net.drop.p, net.body[1].momentum, net.best_loss, net.run = 0.5, 0.9, 0.1, "last"
        net.val_acc, net.epoch = 0.9, 3.0
    elif how == "class":
        net.__class__ = Renamed
    elif how == "type":
        net.bfloat16()
    elif how == "inplace":
        net.body[2].inplace = True
    elif how == "longer":
        net.mean = torch.ones(5, 1, 1)


@pytest.mark.parametrize("how", ["training", "class", "type", "inplace", "longer"])
def test_what_outputs_do_not_depend_on_may_differ(how, caplog):
    pool = family(Net())
    harmless(pool["svhn"], how)
    assert didi(pool, budget=1e6).tasks == ["mnist", "svhn"]
    assert "differs" not in caplog.text


class Beside(nn.Module):
    """Holds tensors and modules without registering them."""

    def __init__(self):
        super().__init__()
        self.body, self.table = nn.Linear(4, 4), torch.ones(4)
        self.layers, self.by_name = [nn.Linear(4, 4)], {"last": (nn.Linear(4, 4),)}
        self._factors = [torch.ones(4), {"of": torch.ones(4)}]
        self.same = [self.body, self.body.weight, nn.Sequential(self.body)]
        self.by_name["up"] = self

    def forward(self, x):
        x = self.layers[0](self.same[2](x)) * self.table
        return self.by_name["last"][0](x) * self._factors[0] * self._factors[1]["of"]


BESIDE = {
    "a tensor": (lambda net: net.table.add_(1), "the tensor table, which"),
    "one in containers": (
        lambda net: net._factors[1]["of"].add_(1),
        r"the tensor _factors\[1\]\['of'\], which",
    ),
    "a module": (
        lambda net: net.layers[0].weight.data.add_(1),
        r"the tensor layers\[0\].weight, which",
    ),
    "one of other sizes": (
        lambda net: net.layers.__setitem__(0, nn.Linear(4, 1)),
        r"the tensor layers\[0\].weight, which",
    ),
    "a module in containers": (
        lambda net: net.by_name["last"][0].bias.data.add_(1),
        r"the tensor by_name\['last'\]\[0\].bias",
    ),
    "a setting": (
        lambda net: net.layers.__setitem__(0, nn.Tanh()),
        r"layers\[0\] is .*Linear != .*Tanh",
    ),
    "one module more": (
        lambda net: net.layers.append(nn.Linear(4, 4)),
        r"layers\[1\] .*Linear.* is in the fine-tuned model only",
    ),
    "one module less": (
        lambda net: net.layers.pop(),
        r"layers\[0\] .*Linear.* is in the base model only",
    ),
}


@pytest.mark.parametrize("how", BESIDE)
def test_what_is_held_without_being_registered_is_the_same_in_all_or_named(how):
    change, lost = BESIDE[how]
    pool = family(Beside())
    change(pool["svhn"])
    with pytest.raises(CheckpointMismatchError, match=f"svhn: {lost}"):
        didi(pool)


def test_what_is_held_so_and_is_the_same_is_run():
    pool, x = family(Beside()), torch.randn(2, 4)
    model = didi(pool, budget=1e6)
    for task in model.tasks:
        model.set_task(task)
        torch.testing.assert_close(model(x), pool[task](x))


class ForEvaluation(nn.Linear):
    """Holds a table for evaluation, and gets its weight by a hook."""

    def __init__(self):
        super().__init__(4, 4)
        nn.utils.weight_norm(self, "weight")
        self.history_of_losses, self.table = [torch.ones(1)], None

    @torch.no_grad()
    def train(self, mode=True):
        self.table = None if mode else self.weight_v.exp()
        return super().train(mode)

    @torch.no_grad()
    def forward(self, x):
        return super().forward(x) @ self.table


@pytest.mark.filterwarnings("ignore:.*weight_norm")
@torch.no_grad()
def test_what_is_worked_out_anew_or_noted_in_training_may_differ():
    pool, x = {BASE: ForEvaluation()} | {t: ForEvaluation() for t in "ab"}, torch.randn(2, 4)  # fmt: skip
    want = {}
    for i, (task, net) in enumerate(pool.items()):
        want[task] = net.train().eval()(x)
        net.history_of_losses[0] += i
    model = didi(pool, budget=1e6)
    for task in "ab":
        model.set_task(task)
        torch.testing.assert_close(model(x), want[task], atol=1e-3, rtol=1e-3)


class Cached(nn.Linear):
    def __init__(self):
        super().__init__(4, 4)
        self.table = None

    @torch.no_grad()
    def forward(self, x):
        self.table = self.weight.exp() if self.table is None else self.table
        return x @ self.table


def test_what_forwards_left_in_the_base_model_is_refused_or_told_of(caplog):
    pool, x = family(Cached()), torch.randn(2, 4)
    pool["svhn"](x)
    model = didi(pool, budget=1e6)
    model.set_task("svhn")
    torch.testing.assert_close(model(x), pool["svhn"](x))
    assert "table none != a tensor" in caplog.text
    pool[BASE](x)
    with pytest.raises(
        CheckpointMismatchError, match="(?s)svhn: the tensor table.* left"
    ):
        didi(pool)
    pool["svhn"].table = None
    didi(pool)
    assert "table a tensor != none" in caplog.text


class OfAllKinds(nn.Linear):
    """Its forward reads some attributes, by way of a method, and leaves others there."""

    def __init__(self):
        super().__init__(4, 4)
        self.act, self.scales, self.power = torch.tanh, {"a": [1.0]}, 2
        self.teacher = [nn.Linear(4, 4)]
        self.outputs, self.averages, self.weights = [], {}, None
        self.edges = torch.eye(4).to_sparse()
        self.odd = torch.tensor([torch.nan, 1.0])
        self.lock = None

    def train(self, mode=True):
        super().train(mode)  # and gives nothing, as some do

    def eval(self):
        self.train(False)
        return self

    @property
    def scale(self):
        return self.scales["a"][0]

    def acted(self, x):
        return self.scale * self.act(x) ** self.power

    def forward(self, x):
        self.weights = x.detach()
        return self.acted(self.edges @ super().forward(x).T) + self.odd.nansum()


def test_what_no_forward_reads_may_differ():
    pool, x = family(OfAllKinds()), torch.randn(2, 4)
    for i, net in enumerate(pool.values()):
        net(x + i)
        net.teacher[0].weight.data.add_(i)
        net.outputs.append(torch.ones(1) * i)
        net.averages["weight"] = net.weight.detach() * i
    pool["svhn"].lock = threading.Lock()
    model = didi(pool, budget=1e6)
    model.set_task("svhn")
    torch.testing.assert_close(model(x), pool["svhn"](x))


@pytest.mark.parametrize(
    "key, value, told",
    [
        ("act", torch.relu, "act tanh != relu"),
        ("scales", {"a": [2.0]}, r"scales .*1\.0.* != .*2\.0"),
        ("power", 3, "power 2 != 3"),
        ("odd", torch.ones(3), r"odd of shape \(2,\) != \(3,\)"),
    ],
)
def test_other_values_that_a_forward_reads_are_told_of(caplog, key, value, told):
    pool = family(OfAllKinds())
    setattr(pool["svhn"], key, value)
    didi(pool)
    assert re.search(f"svhn differs .*{told}", caplog.text)


class Scale(nn.Module):
    def __init__(self, by):
        super().__init__()
        self.by = by

    def forward(self, x):
        return self.by * x


class Twice(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Judged(LlamaForCausalLM):
    """Another loss."""

    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs)


def relu(model):
    model.model.layers[1].mlp.act_fn = nn.ReLU()


def other_forward(model):
    layer = model.model.layers[1].mlp
    plain = layer.forward
    layer.forward = lambda h: 2 * plain(h)


def other_class(model):
    model.model.layers[1].mlp.up_proj.__class__ = Twice


def other_positions(model):
    model.model.rotary_emb.inv_freq /= 2


def one_way(model):
    model.model.layers[1].self_attn.is_causal = False


def of_own_class(model):
    model.__class__ = Judged


CHANGED = {
    "activation": (relu, "mlp.act_fn is .*SiLU.* != .*ReLU"),
    "forward": (other_forward, "mlp has a forward of its own"),
    "class": (other_class, "mlp.up_proj is .*Linear != .*Twice"),
    "epsilon": (
        lambda m: setattr(m.model.norm, "variance_epsilon", 0.5),
        "model.norm: variance_epsilon .* != 0.5",
    ),
    "scale": (
        lambda m: setattr(m.model.layers[0].self_attn, "scaling", 1.0),
        "self_attn: scaling .* != 1.0",
    ),
}
TOLD_OF = {
    "positions": (other_positions, "the buffer model.rotary_emb.inv_freq"),
    "mask": (one_way, "self_attn.is_causal True != False"),
    "own class": (of_own_class, "the model is .*Llama.* != .*Judged"),
}


def whole(change=None, seed=0):
    model = fine_tuned(llama(), seed)
    if change is not None:
        change(model)
    return model


def refused(base, tuned):
    return pytest.raises(CheckpointMismatchError, match=f"a: .*{base}.* != .*{tuned}")


@pytest.mark.parametrize("how", CHANGED)
def test_models_of_transformers_that_were_changed_are_refused_by_what_was(how):
    change, lost = CHANGED[how]
    with pytest.raises(CheckpointMismatchError, match=f"a: .*{lost}"):
        check_modules(whole(), {"a": whole(change), "b": whole()})
    with pytest.raises(CheckpointMismatchError, match="a: (?s:.*)b: "):
        check_modules(whole(change), {"a": whole(), "b": whole()})
    check_modules(whole(change), {"a": whole(change)})


@pytest.mark.parametrize("how", TOLD_OF)
def test_changes_of_such_models_that_may_be_harmless_are_told_of(how, caplog):
    change, told = TOLD_OF[how]
    check_modules(whole(), {"a": whole(change), "b": whole()})
    assert re.search(f"a differs .*{told}", caplog.text) and "b differs" not in caplog.text  # fmt: skip


def test_parametrizations_are_the_base_models_or_named(caplog):
    def scaled(by):
        def change(model):
            layer = model.model.layers[0].mlp.up_proj
            nn.utils.parametrize.register_parametrization(layer, "weight", Scale(by))

        return whole(change)

    check_modules(scaled(2.0), {"a": scaled(2.0)})
    assert not caplog.text
    with pytest.raises(CheckpointMismatchError, match="weight.0: by 2.0 != 3.0"):
        check_modules(scaled(2.0), {"a": scaled(3.0)})
    check_modules(scaled(2), {"a": scaled(3)})
    assert "weight.0.by 2 != 3" in caplog.text
    twice = scaled(2.0)
    layer = twice.model.layers[0].mlp.up_proj
    nn.utils.parametrize.register_parametrization(layer, "weight", Scale(2.0))
    with pytest.raises(CheckpointMismatchError, match="weight.1 .*in the fine-tuned"):
        check_modules(scaled(2.0), {"a": twice})


def ran(model):
    model(torch.ones(1, 3, dtype=torch.long), output_hidden_states=True)


def trained_in_mixed_precision(model):
    inside = torch.autocast("cpu", torch.bfloat16)(model.forward.__func__)
    model.forward = types.MethodType(convert_outputs_to_fp32(inside), model)


def sent_about(model):
    add_hook_to_module(model.model.layers[0], AlignDevicesHook("cpu"))


def compiled_forward(model):
    model.forward = torch.compile(model.forward)
    model.model.layers[0].compile()


HARMLESS = {
    "ran": ran,
    "mixed precision": trained_in_mixed_precision,
    "hooks of accelerate": sent_about,
    "compiled": compiled_forward,
    "checkpoints": lambda model: model.gradient_checkpointing_enable(),
    "attention": lambda model: setattr(model.config, "_attn_implementation", "eager"),  # fmt: skip
    "type": lambda model: model.bfloat16(),
    "training": lambda model: model.train(),
    "loss": lambda model: setattr(model, "loss", nn.CrossEntropyLoss()),
    "metric": lambda model: setattr(model, "mean", torchmetrics.MeanMetric()),
}


@pytest.mark.parametrize("how", HARMLESS)
def test_ordinary_states_of_such_models_are_neither_refused_nor_told_of(how, caplog):
    for base, tuned in ((None, HARMLESS[how]), (HARMLESS[how], None)):
        check_modules(whole(base), {"a": whole(tuned, seed=1)})
    assert not caplog.text


def wrapped(change=None, kind=LoraConfig, **settings):
    targets = {"target_modules": ["q_proj"], **settings}
    model = get_peft_model(llama(), kind(**targets)).eval()
    if change is not None:
        change(model)
    return model


def scale(model):
    for module in model.modules():
        if hasattr(module, "scale_layer"):
            module.scale_layer(3.0)


def another_adapter(model):
    model.add_adapter("second", model.peft_config["default"])
    model.set_adapter("second")


def one_more_adapter(model):
    model.add_adapter("second", model.peft_config["default"])


STATES = {
    "merged": lambda model: model.merge_adapter(),
    "disabled": lambda model: model.base_model.disable_adapter_layers(),
    "scaled": scale,
    "another": another_adapter,
}


@pytest.mark.parametrize(
    "kind, settings",
    [
        (LoraConfig, {"modules_to_save": ["lm_head"]}),
        (LoHaConfig, {}),
        (IA3Config, {"feedforward_modules": []}),
    ],
)
@pytest.mark.parametrize("how", STATES)
def test_layers_of_peft_in_another_state_are_refused_with_the_way_out(
    kind, settings, how
):
    change = STATES[how]
    made = functools.partial(wrapped, kind=kind, **settings)
    if kind is IA3Config and how == "scaled":
        pytest.skip("it has no scale")
    check_modules(made(), {"a": made()})
    check_modules(made(change), {"a": made(change)})
    plain = one_more_adapter if how == "another" else None
    for base, tuned in ((plain, change), (change, plain)):
        with pytest.raises(CheckpointMismatchError, match="a: (?s:.*)merge_and_unload"):
            check_modules(made(base), {"a": made(tuned)})


class Steering:
    def __init__(self, by):
        self.by, self.seen, self.all = by, 0, []

    def __call__(self, module, args, y):
        self.seen += 1
        self.all.append(y)
        return y + self.by

    def hook(self, module, args, y):
        return self(module, args, y)


def around(by):
    seen = []

    def hook(module, args, y, *, on=True):
        seen.append(y)
        return y + by

    return hook


def forgotten(by):
    gone = by

    def hook(module, args, y):
        return y + by if args else (gone, hook)

    del gone
    return hook


def given(by, module, args, y):
    return y + by


HOOKS = {
    "around": around,
    "forgotten": forgotten,
    "an object": Steering,
    "a method": lambda by: Steering(by).hook,
    "a default": lambda by: lambda module, args, y, by=by: y + by,
    "partial": lambda by: functools.partial(given, by),
    "within": lambda by: around(torch.tensor(by)),
}


@torch.no_grad()
@pytest.mark.parametrize("kind", HOOKS)
def test_hooks_are_the_base_models_or_told_of(kind, caplog):
    x = torch.randn(2, 3, 6, 6)
    for base, tuned in ((2.0, 3.0), (2.0, None), (None, 3.0), (2.0, 2.0)):
        pool = family(Net())
        for name, by in ((BASE, base), ("mnist", base), ("svhn", tuned)):
            if by is not None:
                pool[name].norm.register_forward_hook(HOOKS[kind](by))
            pool[name](x)
        caplog.clear()
        check_modules(pool.pop(BASE), pool)
        told = "svhn has other hooks than the base model" in caplog.text
        assert told == (base != tuned) and "mnist" not in caplog.text


def test_hooks_that_look_on_for_libraries_are_none_of_the_models(caplog):
    pool = family(llama())
    pool["svhn"].enable_input_require_grads()
    for amount, net in zip((0.1, 0.5, 0.9), pool.values()):
        nn.utils.prune.random_unstructured(net.lm_head, "weight", amount)
    check_modules(pool.pop(BASE), pool)
    assert "hooks" not in caplog.text


class Whole(nn.Module):
    """A model of which the other is a tower."""

    def __init__(self, tower: nn.Module):
        super().__init__()
        self.tower = tower


WRAPPED = {
    "DataParallel": nn.DataParallel,
    "average": torch.optim.swa_utils.AveragedModel,
    "tower": Whole,
}


@pytest.mark.parametrize("how", WRAPPED)
@pytest.mark.parametrize("lost", [None, "float", "activation", "buffer"])
def test_a_wrapped_module_is_held_against_the_base_model(how, lost):
    pool = family(Net())
    want = pool["svhn"]
    pool["svhn"] = WRAPPED[how](want)
    if lost is None:
        model, x = didi(pool, budget=1e6).eval(), torch.randn(2, 3, 6, 6)
        model.set_task("svhn")
        torch.testing.assert_close(model(x), want.eval()(x))
        return
    inside = next(m for m in pool["svhn"].modules() if type(m) is Net)
    changed(inside, lost)
    with pytest.raises(CheckpointMismatchError, match=f"svhn: .*{LOST[lost]}"):
        didi(pool)


class After(nn.Module):
    """A model with more around it."""

    def __init__(self, net):
        super().__init__()
        self.net, self.after = net, nn.Linear(3, 3)
        self.scale, self.loss = nn.Parameter(torch.ones(3)), nn.CrossEntropyLoss()
        self.teacher = nn.Linear(3, 3)

    def forward(self, x):
        y = self.after(self.net(x)) * self.scale
        return y if not self.training else self.loss(y, x)


AROUND = {
    "a module": (After, "After. runs after, scale beside"),
    "in turn": (lambda net: nn.Sequential(net, nn.Softmax(-1)), "runs 1 beside"),
    "deep": (
        lambda net: nn.DataParallel(After(net)),
        "runs module.after, module.scale beside",
    ),
}


@pytest.mark.parametrize("how", AROUND)
def test_what_a_model_runs_around_the_base_models_is_told_of(how, caplog):
    pool, (wrap, told) = family(Net()), AROUND[how]
    pool["svhn"] = wrap(pool["svhn"])
    didi(pool)
    assert re.search(f"svhn .*{told}", caplog.text)
    caplog.clear()
    check_modules(wrap(Net()), {"a": wrap(Net())})
    assert not caplog.text


@pytest.mark.parametrize("kind", [PrefixTuningConfig, PromptTuningConfig])
@pytest.mark.parametrize("around", [lambda model: model, Whole])
def test_inputs_that_peft_learns_are_no_model(kind, around):
    config = kind(task_type="CAUSAL_LM", num_virtual_tokens=3)
    pool = family(llama())
    pool["svhn"] = around(get_peft_model(pool["svhn"], config))
    with pytest.raises(CheckpointMismatchError, match="svhn: .*prompt_encoder learns"):
        didi(pool)
    prefixed = get_peft_model(llama(), config)
    check_modules(prefixed, {"a": copy.deepcopy(prefixed)})


@pytest.mark.parametrize("name", [BASE, "svhn"])
@pytest.mark.parametrize("task", [None, "mnist"])
def test_a_merged_model_is_no_model_of_a_pool(name, task):
    merged = didi(family(Net()), budget=1e6)
    if task:
        merged.set_task(task)
    with pytest.raises(ModelPoolError, match=f"{name}' is a merged model of several"):
        didi({**family(Net()), name: merged})
    plain = merged.materialize("mnist")
    assert didi({**family(Net()), name: plain}, budget=1e6).tasks == ["mnist", "svhn"]


@pytest.mark.parametrize("name", [BASE, "svhn"])
def test_modules_without_shapes_are_no_models_yet(name):
    pool = family(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8)))
    pool[name] = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.LazyLinear(8))
    with pytest.raises(ModelPoolError, match=f"{name}' has parameters that get their"):
        didi(pool)


def packed(net: nn.Module) -> nn.Module:
    return torch.ao.quantization.quantize_dynamic(net, {nn.Linear}, torch.qint8)


class Sharded(torch.Tensor):
    """As tensors that are shared out among processes, or packed: they tell of their parts."""

    def __tensor_flatten__(self):
        return [], None


def sharded(net: nn.Module) -> nn.Module:
    value = net[0].weight.detach().as_subclass(Sharded)
    net[0].weight = nn.Parameter(value, requires_grad=False)
    return net


class Coded(nn.Parameter):
    """As bitsandbytes has them: codes, beside which their scales are kept."""


def coded(net: nn.Module) -> nn.Module:
    value = net[0].weight.detach()
    net[0].weight = Coded((100 * value).to(torch.int8), requires_grad=False)
    return net


def coded_in_floats(net: nn.Module) -> nn.Module:
    """Codes that are kept as another type, with an object that has their scales."""
    net[0].weight = Coded(net[0].weight.detach())
    net[0].weight.quant_state = SimpleNamespace(absmax=torch.ones(4))
    return net


class Decoding(nn.Parameter):
    """Codes that are kept as floating point, by a class that knows what they stand for."""

    def dequantize(self):
        return self * self.scale


class Computing(nn.Parameter):
    """As such a class, by what torch asks it."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        return super().__torch_function__(function, types, args, kwargs or {})


def coded_by(kind: type[nn.Parameter]):
    """Codes in floating point with their scales."""

    def code(net: nn.Module) -> nn.Module:
        net[0].weight = kind(net[0].weight.detach())
        net[0].weight.scale = torch.ones(8, 1)
        return net

    return code


def with_scales(net: nn.Module) -> nn.Module:
    """Plain whole numbers; the layer saves their scales."""
    save = lambda module, state, prefix, _: state.update({f"{prefix}scale": torch.ones(1)})  # fmt: skip # noqa: E731
    whole = torch.ones(8, 4, dtype=torch.uint8)
    net[0].weight = nn.Parameter(whole, requires_grad=False)
    net[0].register_state_dict_post_hook(save)
    return net


def quantized(method: str, **how):
    """As transformers marks them."""

    def mark(net: nn.Module) -> nn.Module:
        told = {"quant_method": method, **how}
        net.hf_quantizer = SimpleNamespace(quantization_config=told)
        return net

    return mark


def inside(net: nn.Module) -> nn.Module:
    return nn.Sequential(torch.jit.script(net[0]), *net[1:])


CLOSED = {
    "scripted": (torch.jit.script, "the model is a torch.jit program"),
    "traced": (
        lambda net: torch.jit.trace(net, torch.ones(1, 4)),
        "the model is a torch.jit program",
    ),
    "scripted within": (inside, "0 is a torch.jit program"),
    "quantized": (packed, "0 is a quantized layer"),
    "sharded": (sharded, "0.weight is a Sharded"),
    "coded": (coded, "0.weight is a Coded"),
    "coded in floats": (coded_in_floats, "0.weight is a Coded"),
    "decoding": (coded_by(Decoding), "0.weight is a Decoding"),
    "computing": (coded_by(Computing), "0.weight is a Computing"),
    "with scales": (with_scales, "0.weight is of torch.uint8, with 0.scale beside it"),
    "marked": (quantized("gptq"), "the model is quantized by gptq"),
    "marked within": (
        lambda net: nn.Sequential(quantized("bitsandbytes", load_in_8bit=True)(net)),
        "0 is quantized by bitsandbytes",
    ),
}


@pytest.mark.filterwarnings("ignore:.*deprecated")
@pytest.mark.parametrize("names", [[BASE], ["svhn"], [BASE, "mnist", "svhn"]])
@pytest.mark.parametrize("how", CLOSED)
def test_modules_whose_weights_are_closed_are_refused_by_name(how, names):
    pool, (change, why) = family(nn.Sequential(nn.Linear(4, 8), nn.ReLU())), CLOSED[how]
    pool |= {name: change(copy.deepcopy(pool[name])) for name in names}
    with pytest.raises(CheckpointMismatchError, match=f"^'{names[0]}' .*{why}.* Give "):
        didi(pool)


def of_a_class_of_its_own(net: nn.Module) -> nn.Module:
    net[0].weight = Coded(net[0].weight.detach())
    net[0].weight.init, net[0].weight.group = nn.init.zeros_, {"decay": 0.1}
    net[0].weight.initial, net[0].weight.mask = torch.zeros(8, 4), torch.ones(8, 4)
    net[0].weight.trainer = SimpleNamespace(average=torch.ones(8, 4))
    return net


def with_tensors_beside(net: nn.Module) -> nn.Module:
    """As trainers leave them on plain parameters."""
    net[0].weight.main_grad = torch.ones(8, 4)
    return net


def with_a_table(net: nn.Module) -> nn.Module:
    """Whole numbers that stand for themselves, in a model that saves a metric's state beside them."""
    net[0].metric = nn.Module()
    net[0].table = nn.Parameter(torch.arange(3), requires_grad=False)
    net[0].metric.register_state_dict_post_hook(
        lambda module, state, prefix, _: state.update({f"{prefix}seen": torch.ones(1)})
    )
    return net


def with_a_version(net: nn.Module) -> nn.Module:
    """Whole numbers that stand for themselves, in a model that saves its version beside them."""
    net[0].table = nn.Parameter(torch.arange(3), requires_grad=False)
    net[0].register_state_dict_post_hook(
        lambda module, state, prefix, _: state.update({f"{prefix}version": torch.tensor(1)})  # fmt: skip
    )
    return net


OPEN = {
    "graph": torch.fx.symbolic_trace,
    "compiled": torch.compile,
    "DataParallel": nn.DataParallel,
    "of a class of its own": of_a_class_of_its_own,
    "with tensors beside": with_tensors_beside,
    "with a table": with_a_table,
    "with a version": with_a_version,
    "quantized in nothing": quantized("bitsandbytes", load_in_4bit=False),
    "float8, decoded": quantized("fp8"),
}


@pytest.mark.parametrize("how", OPEN)
def test_modules_whose_weights_can_be_read_are_merged(how):
    pool = family(nn.Sequential(nn.Linear(4, 8), nn.ReLU()))
    made = {name: OPEN[how](copy.deepcopy(net)) for name, net in pool.items()}
    model, x = didi(made, budget=1e6), torch.randn(2, 4)
    want = pool["svhn"](x)
    torch.testing.assert_close(model.materialize("svhn")(x), want)


def test_a_base_model_in_a_process_group_is_refused(monkeypatch):
    pool = family(nn.Linear(4, 8))
    monkeypatch.setattr(nn.parallel, "DistributedDataParallel", nn.DataParallel)
    pool[BASE] = nn.DataParallel(pool[BASE])
    with pytest.raises(ModelPoolError, match="in DistributedDataParallel.*its module"):
        didi(pool)


def test_a_base_model_that_cannot_be_copied_is_named():
    """It holds a lock, or an open file."""
    models = family(Net(), ("a", "b"))
    models[BASE].lock = threading.Lock()
    with pytest.raises(ModelPoolError, match="cannot be copied .TypeError.*_target_"):
        didi(models)


class Kept(nn.Linear):
    """Keeps what it computes."""

    def __init__(self):
        super().__init__(4, 4)
        self.last = None

    def forward(self, x):
        self.last = super().forward(x)
        return self.last


@pytest.mark.filterwarnings("ignore:.*weight_norm")
@pytest.mark.parametrize("how", ["normed", "pruned", "kept"])
def test_a_base_model_that_holds_gradients_is_told_what_to_run(how):
    def made() -> nn.Module:
        if how == "kept":
            return Kept()
        net = nn.Linear(4, 4)
        if how == "normed":
            return nn.utils.weight_norm(net)
        return nn.utils.prune.identity(net, "weight")

    models, x = {name: made() for name in (BASE, "a", "b")}, torch.randn(2, 4)
    models[BASE](x)
    with pytest.raises(ModelPoolError, match="(weight|last) are.*torch.no_grad.*_targ"):
        didi(models)
    with torch.no_grad():
        models[BASE](x)
    didi(models)


def test_a_base_model_of_sparse_weights_is_told_that_it_is():
    models = family(nn.Linear(4, 4), ("a", "b"))
    weight = models[BASE].weight.detach().to_sparse()
    models[BASE].weight = nn.Parameter(weight)
    with pytest.raises(ModelPoolError, match="weight are sparse, expected dense"):
        didi(models)


def test_a_wrapped_module_is_rounded_to_the_base_models_type():
    """Its names have a prefix, and rounding went by names."""
    base = nn.Linear(3, 3).bfloat16()
    tuned = {task: nn.DataParallel(nn.Linear(3, 3)) for task in "ab"}
    pool = BaseModelPool({BASE: base, **tuned})
    vectors = open_pool(pool, base)
    for task, name in enumerate(tuned):
        found, want = vectors.tensor("weight").tuned(task), tuned[name].module.weight
        assert found.equal(want.bfloat16()) and found.dtype == torch.bfloat16
