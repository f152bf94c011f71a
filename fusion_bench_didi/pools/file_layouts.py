"""What ``from_pretrained`` makes of the names in a checkpoint, by transformers' own rules: 4 and 5 keep them in other places.

transformers 5 also computes weights when it loads them, out of one tensor or several (experts that are one tensor in memory and
many in the file): then only the loaded model says what is there.
"""

from collections.abc import Sequence

from transformers import PreTrainedModel

try:
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key
except ImportError:  # transformers 4
    get_model_conversion_mapping = None


def loaded_names(found: Sequence[str], model: object) -> dict[str, str]:
    """Name in memory by name in a file; names that the rules say nothing about stay as they are.

    Of a model with a head, of which this one is the part below it, the head's names are left out.
    """
    if not isinstance(model, PreTrainedModel):
        return {name: name for name in found}
    if get_model_conversion_mapping is not None:
        return _by_transformers_5(found, model)[0]
    prefix = model.base_model_prefix
    has = bool(prefix) and any(name.startswith(prefix) for name in found)
    expects = bool(prefix) and hasattr(model, prefix)
    rename, layout = model._get_key_renaming_mapping, _older_layout(model)
    try:
        return rename(found, layout, has and not expects, expects and not has)
    except ValueError:
        # what transformers calls corrupted is told by the names that are missing
        return {name: name for name in found}


def _older_layout(model: PreTrainedModel) -> dict[str, str] | None:
    """The names that transformers 4 knows of files from before a class was rearranged, as patterns; None for others."""
    return getattr(type(model), "_checkpoint_conversion_mapping", None) or None


def rearranged(found: Sequence[str], model: object) -> dict[str, str]:
    """Name in memory by name in an adapter's file, as PEFT maps them: only by what the class says, for an adapter may hold tensors of
    any part of the model."""
    if not isinstance(model, PreTrainedModel):
        return {}
    if get_model_conversion_mapping is not None:
        names, computed = _by_transformers_5(found, model)
        return {old: new for old, new in names.items() if old not in computed}
    layout = _older_layout(model)
    return model._get_key_renaming_mapping(found, layout) if layout else {}


def holds_other_names(model: object) -> bool:
    """Whether checkpoints of a model's class hold tensors under other names than it has in memory."""
    if not isinstance(model, PreTrainedModel):
        return False
    if get_model_conversion_mapping is not None:
        return bool(get_model_conversion_mapping(model, add_legacy=False))
    return bool(_older_layout(model))


def computed_on_loading(found: Sequence[str], model: object) -> list[str]:
    """Names in a file whose tensors are not loaded as they are."""
    if get_model_conversion_mapping is None or not isinstance(model, PreTrainedModel):
        return []
    return _by_transformers_5(found, model)[1]


def _by_transformers_5(
    found: Sequence[str], model: PreTrainedModel
) -> tuple[dict[str, str], list[str]]:
    rules, state = get_model_conversion_mapping(model), model.state_dict()
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if not isinstance(rule, WeightRenaming)]
    prefix, names, computed = model.base_model_prefix, {}, []
    below = f"{prefix}." if prefix and not hasattr(model, prefix) else ""
    if not any(name.startswith(below) for name in found):
        below = ""
    for old in found:
        new, pattern = rename_source_key(old, renamings, converters, prefix, state)
        if new not in state and old in state:
            new, pattern = rename_source_key(old, [], [], prefix, state)
        if pattern is not None and new in state:
            computed.append(old)
        if new in state or old.startswith(below):
            names[old] = new
    return names, computed
