"""Settings of configurations that outputs depend on while all tensors keep their shapes, found by changing each.

    python -m benchmarks.computed_settings [CLASS ...]     # an hour of one core for every class of each architecture

Small random models of every architecture of the installed transformers; each setting of their configurations is given other
values, one at a time, and the same weights are run again. What moves outputs belongs into ``COMPUTED`` of
``fusion_bench_didi/pools/configurations.py``, by which fine-tuned models that compute something else are refused; names that
are not there are printed, with the classes that they were found in.
"""

import argparse
import copy
import multiprocessing
import os
from collections.abc import Iterator
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import transformers
from transformers import PretrainedConfig, PreTrainedModel

from benchmarks.architecture_bench import close, output_of
from benchmarks.architectures import _quiet, classes
from benchmarks.small_models import _arguments, inputs, small_model
from fusion_bench_didi.pools.configurations import COMPUTED

#: of one class
SECONDS = 120
#: relative distance of outputs that the order of sums makes
ROUNDING = 1e-4
#: settings that move outputs and are compared by rules of their own, or are of what comes out rather than of what is computed
ELSEWHERE = {
    *("tie_word_embeddings", "max_position_embeddings", "num_hidden_layers"),
    *("pad_token_id", "eos_token_id", "decoder_start_token_id", "max_seq_len"),
    *("use_cache", "output_router_logits", "mem_len", "reuse_len", "use_mems_eval"),
    *("image_size", "rescale_every", "reorder_and_upcast_attn", "router_jitter_noise"),
    *("subs_pad_id", "tag_pad_id", "mask_ratio", "do_mask_input", "max_text_len"),
    *("num_channels_out", "output_hidden_states", "output_attentions", "return_dict"),
}
#: other values of settings that are words
WORDS = ("relu", "silu", "gelu", "tanh", "mean", "cls", "max", "layer", "group", "default", "full", "relative_key")  # fmt: skip


def settings(config: PretrainedConfig, within: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:  # fmt: skip
    """Places of settings, those of configurations inside with them, and their values."""
    for name in sorted(_arguments(type(config))):
        value = getattr(config, name, None)
        if isinstance(value, PretrainedConfig):
            yield from settings(value, (*within, name))
        else:
            yield (*within, name), value


def others(value: Any) -> list[Any]:
    """Other values of the same kind."""
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int):
        return [v for v in (value + 1, value * 2, value // 2, 1) if v not in (value, 0)]
    if isinstance(value, float):
        return [value * 2 + 0.1, value / 100]
    if isinstance(value, str):
        return [word for word in WORDS if word != value]
    if isinstance(value, (list, tuple)) and value:
        first = others(value[0])
        changed = [type(value)([new, *value[1:]]) for new in first[:2]]
        same = [type(value)([one] * len(value)) for one in dict.fromkeys(map(str, value)) if type(value[0]) is str]  # fmt: skip
        return [*changed, *same, type(value)(value[::-1])]
    if value is None:
        return [True, 0.5, 2]
    return []


def moving(kind: type[PreTrainedModel]) -> Iterator[str]:
    """Names of settings of a class that move outputs of the same weights."""
    model = small_model(kind)
    state = model.state_dict()
    for batch in inputs(model):
        try:
            expected = output_of(model, batch)
            break
        except Exception:  # of any type: it takes something else
            continue
    else:
        return
    for place, value in settings(model.config):
        for other in others(value):
            try:
                if not close(output_of(_with(model, place, other, state), batch), expected, ROUNDING):  # fmt: skip
                    yield place[-1]
                    break
            except Exception:  # of any type: no such model
                continue


def _with(model: PreTrainedModel, place: tuple[str, ...], value: Any, state: dict[str, Any]) -> PreTrainedModel:  # fmt: skip
    """A model with one setting changed and the same tensors, as its class makes it of the configuration's file."""
    told = copy.deepcopy(model.config).to_dict()
    inner = told
    for name in place[:-1]:
        inner = inner[name]
    inner[place[-1]] = value
    config = type(model.config).from_dict(told)
    made = type(model)(config).float().eval()
    made.load_state_dict(state)
    return made


def _child(name: str, out: Any) -> None:
    try:
        for found in moving(getattr(transformers, name)):
            out.send(found)
    except Exception as error:  # of any type: no small model can be made of it
        print(f"{name}: not tried, {type(error).__name__}", flush=True)


def found_in(names: list[str]) -> Iterator[tuple[str, str]]:
    """Settings that move outputs, and the class; each class in a process of its own that may take so long."""
    context = multiprocessing.get_context("fork")
    for name in names:
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=_child, args=(name, theirs))
        process.start()
        theirs.close()
        try:
            while ours.poll(SECONDS):
                yield ours.recv(), name
        except EOFError:
            pass
        process.kill()
        process.join()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("classes", nargs="*", help="all if none")
    asked = parser.parse_args().classes
    _quiet()
    torch.set_num_threads(1)
    where: dict[str, list[str]] = {}
    for setting, name in found_in(asked or list(classes())):
        where.setdefault(setting, []).append(name)
        if setting not in COMPUTED | ELSEWHERE:
            print(f"{setting}: {name}", flush=True)
    print(f"{len(where)} settings move outputs; not in COMPUTED:")
    for setting in sorted(set(where) - COMPUTED - ELSEWHERE):
        print(f"  {setting}: {', '.join(where[setting][:4])}")


if __name__ == "__main__":
    main()
