"""The file of a saved cache: written whole or not at all, and believed only if it is what was written, for the same
model."""

import contextlib
import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import PreTrainedConfig, PreTrainedModel


_FORMAT = "longnet_hf.DilatedCache"
_VERSION = 2

# Fields of a configuration that change no key and no value
_OF_NO_MATTER = {
    *(field.name for field in dataclasses.fields(PreTrainedConfig)),
    *("attention_dropout", "embedding_dropout", "hidden_dropout", "drop_path_rate", "classifier_dropout"),
    *("initializer_range", "use_cache", "skip_logits", "tie_word_embeddings"),
    *("bos_token_id", "eos_token_id", "pad_token_id"),
}


def write_cache(
    file: str | os.PathLike, tensors: dict[str, torch.Tensor], fields: dict[str, int], model: PreTrainedModel
) -> None:
    """Replace `file` once the new one is whole."""
    tensors = {name: x.contiguous() for name, x in tensors.items()}
    metadata = {
        "format": f"{_FORMAT} {_VERSION}",
        "fields": json.dumps(fields),
        "config": json.dumps(_config_of(model)),
        "weights": _checksum_of_weights(model),
    }
    metadata["checksum"] = _checksum(tensors, tensors.__getitem__, metadata)
    unfinished = f"{os.fspath(file)}.unfinished"
    save_file(tensors, unfinished, metadata)
    os.replace(unfinished, file)


class SavedCache:
    """An open file of a saved cache, once it was checked.

    Args:
        fields: what [`write_cache`] was given.
    """

    def __init__(self, file, fields: dict[str, int]):
        self._file, self.fields = file, fields

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._file.get_tensor(name)


@contextlib.contextmanager
def open_cache(file: str | os.PathLike, model: PreTrainedModel) -> Iterator[SavedCache]:
    """Open what [`write_cache`] wrote.

    Raises:
        ValueError: if it is no such file, if anything in it was changed, or if `model` is not that of the cache. The
            file is named.
        OSError: if the file cannot be read.
    """
    path = repr(os.fspath(file))
    with contextlib.ExitStack() as stack:
        try:
            saved = stack.enter_context(safe_open(file, framework="pt"))
            metadata = saved.metadata() or {}
            name, _, version = metadata.get("format", "").rpartition(" ")
            if name != _FORMAT:
                raise ValueError(f"`file` holds no DilatedCache: {path}.")
            if version != str(_VERSION):
                raise ValueError(
                    f"The cache in {path} has version {version} of the format, and this package reads {_VERSION}: "
                    "read the text again, and save that cache."
                )
            expected = metadata.pop("checksum", None)
            if _checksum(saved.keys(), saved.get_tensor, metadata) != expected:
                raise ValueError(f"The cache in {path} is damaged: it is not what was saved.")
        except SafetensorError as error:
            raise ValueError(f"`file` is no safetensors file, or a damaged one: {path} ({error}).") from error
        _check_model(path, metadata, model)
        yield SavedCache(saved, json.loads(metadata["fields"]))


def _check_model(path: str, metadata: dict[str, str], model: PreTrainedModel) -> None:
    of_file, of_model = json.loads(metadata["config"]), json.loads(json.dumps(_config_of(model)))
    differences = [
        f"`{name}` was {of_file.get(name)!r} and is {of_model.get(name)!r}"
        for name in sorted(of_file.keys() | of_model.keys())
        if of_file.get(name) != of_model.get(name)
    ]
    if differences:
        raise ValueError(
            f"The cache in {path} was filled by another model, with another configuration than `model`: "
            f"{'; '.join(differences)}."
        )
    if metadata["weights"] != _checksum_of_weights(model):
        raise ValueError(
            f"The cache in {path} was filled by another model: `model` has other weights, or the same in another "
            "dtype."
        )


def _config_of(model: PreTrainedModel) -> dict:
    """The fields of the configuration on which keys and values depend: those that its class declares."""
    names = {field.name for field in dataclasses.fields(model.config)} - _OF_NO_MATTER
    return {name: value for name, value in model.config.to_dict().items() if name in names}


def _checksum_of_weights(model: PreTrainedModel) -> str:
    weights = dict(model.named_parameters())
    if any(weight.is_meta for weight in weights.values()):
        raise ValueError(
            "Weights of `model` are on the meta device (not loaded, or offloaded), where they cannot be compared with "
            "those that filled a cache."
        )
    return _checksum(weights, lambda name: weights[name].data)


def _checksum(names: Iterable[str], tensor: Callable[[str], torch.Tensor], metadata: dict | None = None) -> str:
    """Sees any change of a name, a shape, a dtype or a number."""
    checksum = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    for name in sorted(names):
        x = tensor(name)
        checksum.update(f"{name} {x.dtype} {tuple(x.shape)}".encode())
        checksum.update(x.contiguous().flatten().view(torch.uint8).cpu().numpy())
    return checksum.hexdigest()


__all__ = ["SavedCache", "open_cache", "write_cache"]
