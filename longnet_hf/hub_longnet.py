"""What goes to the Hub with a LongNet: its code for every Auto class, and a model card (README.md)."""

import functools
import io
import sys
from collections.abc import Callable
from pathlib import Path

from huggingface_hub import HfApi, ModelCard, ModelCardData
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from .pattern_report import DESCRIBED_LENGTH, PatternDescription, describe_patterns


logger = logging.get_logger(__name__)


# The class that every Auto class loads, all of modeling_longnet.py
MODEL_CLASSES = {
    "AutoModel": "LongNetModel",
    "AutoModelForCausalLM": "LongNetForCausalLM",
    "AutoModelForMaskedLM": "LongNetForMaskedLM",
    "AutoModelForSequenceClassification": "LongNetForSequenceClassification",
    "AutoModelForTokenClassification": "LongNetForTokenClassification",
    "AutoModelForQuestionAnswering": "LongNetForQuestionAnswering",
}
# Saved with every model, so that code which comes from the Hub serves all Auto classes, not only the one that was
# saved.
AUTO_MAP = {"AutoConfig": "configuration_longnet.LongNetConfig"} | {
    auto_class: f"modeling_longnet.{model_class}" for auto_class, model_class in MODEL_CLASSES.items()
}

_TEMPLATE = """---
{metadata}
---

# {title}

{sections}"""
_SECTIONS = """{begin}
A LongNet: a Transformers model with dilated attention ("LongNet: Scaling Transformers to 1,000,000,000 Tokens",
[arXiv 2307.02486](https://arxiv.org/abs/2307.02486)), whose cost grows linearly with the length of the sequence{but}.

## Use

The code comes with the weights; neither LongNet nor flash-attn needs to be installed.

```python
from transformers import {auto_class}

model = {auto_class}.from_pretrained("{repo_id}", trust_remote_code=True)
```

## Architecture

| | |
|---|---|
| context length | {config.max_position_embeddings} tokens |
| layers, hidden size | {config.num_hidden_layers}, {config.hidden_size} |
| heads (key/value), head size | {config.num_attention_heads} ({config.num_key_value_heads}), {config.head_dim} |
| vocabulary | {vocabulary} |
| head offset | {config.head_offset} |
| segments shifted in odd layers | {shift} |
| layers with full attention | {full} |
| key/value heads with full attention in other layers | {full_heads} |
| first tokens that all see (sink) | {sink} |

| branch | type | segment length | dilation rate |
|---|---|---|---|
{branches}

{reach}

```text
{description}
```
{picture}
## Citation

```bibtex
@article{{ding2023longnet,
  title={{LongNet: Scaling Transformers to 1,000,000,000 Tokens}},
  author={{Ding, Jiayu and Ma, Shuming and Dong, Li and Zhang, Xingxing and Huang, Shaohan and Wang, Wenhui and Zheng,
    Nanning and Wei, Furu}},
  journal={{arXiv preprint arXiv:2307.02486}},
  year={{2023}}
}}
```
{end}
"""
# Beside the card, where matplotlib is installed; of a name that no picture of a user's own has
PICTURE = "longnet_pattern.png"
_LINK = f"\n![Which queries attend to which keys, in all heads and in every head]({PICTURE})\n"
# Around our part of a card, other parts of which Trainer writes
_BEGIN, _END = "<!-- longnet: begin -->", "<!-- longnet: end -->"


_PIPELINES = {
    "AutoModelForCausalLM": "text-generation",
    "AutoModelForMaskedLM": "fill-mask",
    "AutoModelForSequenceClassification": "text-classification",
    "AutoModelForTokenClassification": "token-classification",
    "AutoModelForQuestionAnswering": "question-answering",
    "AutoModelForImageClassification": "image-classification",
}


class HubMixin:
    """How a LongNet model is saved and pushed: its code travels with the weights, and so does a model card."""

    code_of_auto_classes: dict[str, str] = AUTO_MAP
    completes_cards = True  # known by this, not by the class, of which code from the Hub has its own

    def save_pretrained(self, save_directory, *args, **kwargs):
        """As in Transformers. The code travels with the weights, for every Auto class, and so does a model card."""
        self.config.auto_map = dict(self.code_of_auto_classes)
        complete_trainers_cards()
        wrapped = type(self)
        try:
            # FSDP2 puts a class of PyTorch's in front of ours, whose code Transformers would save in place of ours
            self.__class__ = next(base for base in wrapped.__mro__ if not base.__module__.startswith("torch."))
            super().save_pretrained(save_directory, *args, **kwargs)
        finally:
            self.__class__ = wrapped
        if kwargs.get("is_main_process", True):
            write_model_card(self.config, self._auto_class, save_directory)

    def _upload_modified_files(self, working_dir, repo_id, *args, **kwargs):
        # Both ways of pushing come here
        where = (kwargs.get("revision"), kwargs.get("token"))
        prepare_model_card(self.config, self._auto_class, working_dir, repo_id, *where)
        return super()._upload_modified_files(working_dir, repo_id, *args, **kwargs)


def model_card(config, auto_class: str, repo_id: str, has_picture: bool = False) -> str:
    """The card's text, for a configuration, the Auto class of the model and the name or path that it is loaded by; and
    whether there is a picture beside it."""
    metadata, title = _metadata(auto_class).to_yaml(), repo_id.split("/")[-1]
    sections = _sections(config, auto_class, repo_id, has_picture)
    return _TEMPLATE.format(metadata=metadata, title=title, sections=sections)


def describe_config(config) -> PatternDescription:
    """The description in the card: of sequences of the context length, up to a limit."""
    length = min(config.max_position_embeddings, DESCRIBED_LENGTH)
    return describe_patterns(config.layer_patterns, config.num_key_value_heads, length, is_causal=config.is_causal)


def _is_unbounded(config) -> bool:
    """Whether some layers or heads attend to everything."""
    is_full = config.full_attention_layers or any((config.full_attention_heads or {}).values())
    return None in config.segment_lengths or bool(is_full)


def write_picture(config, folder: Path) -> bool:
    """Write the picture of the pattern beside a card, and say whether there is one. Without matplotlib there is none,
    and nothing that goes wrong with a picture may cost anyone a checkpoint."""
    try:
        description = describe_config(config)
        patterns = tuple(description.patterns)
        picture = _drawn(patterns, config.num_key_value_heads, description.length, config.is_causal)
        (folder / PICTURE).write_bytes(picture)
    except ImportError:
        return False
    except Exception as error:
        logger.warning("The picture of the pattern was not drawn: %s", error)
        return False
    return True


# Trainer saves many checkpoints, each with a card: the picture of a pattern is drawn once in a process
@functools.lru_cache(maxsize=8)
def _drawn(patterns: tuple, num_heads: int, length: int, is_causal: bool) -> bytes:
    file = io.BytesIO()
    describe_patterns(patterns, num_heads, length, is_causal=is_causal).draw().savefig(file, format="png", dpi=80)
    return file.getvalue()


def _metadata(auto_class: str) -> ModelCardData:
    return ModelCardData(
        library_name="transformers",
        pipeline_tag=_PIPELINES.get(auto_class, "feature-extraction"),
        tags=["longnet", "dilated-attention"],
    )


def _sections(config, auto_class: str, repo_id: str, has_picture: bool) -> str:
    types = config.branch_types or ["segment"] * len(config.segment_lengths)
    rows = zip(types, config.segment_lengths, config.dilation_rates, strict=True)
    unbounded = _is_unbounded(config)
    full_heads = sum(map(len, (config.full_attention_heads or {}).values()))
    beyond = f", but for the first {config.sink_tokens} tokens" if config.sink_tokens else ""
    return _SECTIONS.format(
        begin=_BEGIN,
        end=_END,
        repo_id=repo_id,
        auto_class=auto_class,
        description=describe_config(config),
        picture=_LINK if has_picture else "",
        but=", but for what attends to everything" if unbounded else "",
        reach="Some layers or heads attend to everything."
        if unbounded
        else f"A pair of tokens further apart than the longest segment or window is not seen directly{beyond}.",
        config=config,
        vocabulary=config.vocab_size or "none",
        shift="yes" if config.segment_shift else "no",
        full=", ".join(map(str, config.full_attention_layers or ())) or "none",
        full_heads=full_heads or "none",
        sink=config.sink_tokens or "none",
        branches="\n".join(
            f"| {i} | {kind} | {'all' if length is None else length} | {rate} |"
            for i, (kind, length, rate) in enumerate(rows)
        ),
    )


def write_model_card(config, auto_class: str, directory) -> None:
    """Write the card into a folder that has none."""
    path = Path(directory).resolve() / "README.md"
    if not path.exists():
        has_picture = write_picture(config, path.parent)
        path.write_text(model_card(config, auto_class, path.parent.name, has_picture), encoding="utf-8")


def prepare_model_card(
    config, auto_class: str, directory, repo_id: str, revision: str | None = None, token=None
) -> None:
    """In a folder about to be uploaded, put the card in the place of the empty one that Transformers writes where the
    main branch has none. A card that is in the repository stays; one that Trainer wrote gets our part, if it has none.
    """
    path, api = Path(directory) / "README.md", HfApi(token=token)
    if not api.file_exists(repo_id, path.name, revision=revision):
        path.write_text(model_card(config, auto_class, repo_id, write_picture(config, path.parent)), encoding="utf-8")
        return
    card = ModelCard.load(api.hf_hub_download(repo_id, path.name, revision=revision), ignore_metadata_errors=True)
    if "generated_from_trainer" in (card.data.tags or ()) and _BEGIN not in card.text:
        card.save(path)
        complete_card(config, auto_class, path, repo_id)
        return
    if f"({PICTURE})" not in card.text:
        (path.parent / PICTURE).unlink(missing_ok=True)  # by saving, which knew nothing of the repository's card
    if revision is not None:
        path.unlink()


def complete_card(config, auto_class: str, path: Path, repo_id: str) -> None:
    """Add our part to a card that says nothing of what a LongNet is and how it is loaded. What it says stays."""
    card = ModelCard.load(path, ignore_metadata_errors=True)
    if _BEGIN in card.text:
        return
    for name, ours in _metadata(auto_class).to_dict().items():
        theirs = getattr(card.data, name, None)
        if name == "tags":
            ours = [*(theirs or ()), *(tag for tag in ours if tag not in (theirs or ()))]
        if theirs is None or name == "tags":
            setattr(card.data, name, ours)
    sections = _sections(config, auto_class, repo_id, write_picture(config, path.parent))
    card.text = f"{card.text.rstrip()}\n\n{sections}"
    card.save(path)


def complete_trainers_cards() -> None:
    """Let the card that a Trainer writes over ours have our part, too.

    Trainer writes it from what it knows, and has no hook for it; those of TRL write their own. But before, both save
    the model, which is when this is called: with all classes of trainers there.
    """
    trainer = sys.modules.get("transformers.trainer")  # not imported for this
    classes = [trainer.Trainer] if trainer is not None else []
    while classes:
        trainer_class = classes.pop()
        classes += trainer_class.__subclasses__()
        create = vars(trainer_class).get("create_model_card")
        if create is not None and not getattr(create, "completes_longnets", False):
            trainer_class.create_model_card = _completing(create)


def _completing(create_model_card: Callable) -> Callable:
    @functools.wraps(create_model_card)
    def wrapped(self, *args, **kwargs):
        result = create_model_card(self, *args, **kwargs)
        model, path = self.accelerator.unwrap_model(self.model), Path(self.args.output_dir) / "README.md"
        if getattr(model, "completes_cards", False) and self.is_world_process_zero() and path.exists():
            complete_card(model.config, model._auto_class, path, self.hub_model_id or path.resolve().parent.name)
        return result

    wrapped.completes_longnets = True
    return wrapped


def forget_name(model: PreTrainedModel) -> None:
    """Forget where the weights of a model came from that has another attention now.

    Many read that name again, and would get the source with its dense attention: TRL for reference models, PEFT for
    the base of an adapter.
    """
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            module.name_or_path = None
            for config in with_parts(module.config):
                config._name_or_path = ""


def with_parts(config: PreTrainedConfig) -> list[PreTrainedConfig]:
    """A configuration, and those inside of it (of text, of images, ...)."""
    return [config, *(part for name in config.sub_configs if (part := getattr(config, name, None)) is not None)]


__all__ = ["AUTO_MAP", "MODEL_CLASSES", "HubMixin", "forget_name", "with_parts"]
