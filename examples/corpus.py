"""Texts for the examples that train: documents, tokenizer, contexts of one length, and the loss on held-out ones."""

import glob
import math
import sysconfig
from dataclasses import dataclass, field

import torch
from datasets import Dataset, DatasetDict, load_dataset
from measurements import token_losses
from text_files import find_files, standard_library_files
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm.auto import tqdm
from training import check_at_least
from transformers import PreTrainedModel, PreTrainedTokenizerFast, TrainingArguments


@dataclass
class DataArguments:
    """What is read, and in which pieces."""

    data: list[str] | None = field(
        default=None,
        metadata={
            "help": "Files, folders and patterns such as 'src/**/*.py', or one dataset on the Hub as name or "
            "name:config. Default: the sources of Python's standard library."
        },
    )
    text_column: str = field(default="text", metadata={"help": "Column with the text, in a dataset on the Hub."})
    context_length: int = field(default=8192, metadata={"help": "Tokens in a training example."})
    held_out: float = field(default=0.06, metadata={"help": "Share of the documents that is kept for evaluation."})
    max_held_out_contexts: int = field(default=24, metadata={"help": "Evaluate on at most so many contexts."})

    def __post_init__(self):
        check_at_least(self, context_length=2, max_held_out_contexts=1)
        if not 0 < self.held_out < 1:
            raise ValueError(f"`--held_out` must lie between 0 and 1, got {self.held_out}.")


def load_documents(args: DataArguments) -> Dataset:
    """One document a row, in the column "text"."""
    files = find_files(args.data) if args.data else standard_library_files()
    if files:
        # Sorted by folder: related files become neighbours, see `make_contexts`
        names = [glob.escape(str(path)) for path in sorted(files)]
        return load_dataset("text", data_files=names, sample_by="document", encoding_errors="replace", split="train")
    if not args.data:
        raise ValueError(f"There are no .py files in {sysconfig.get_paths()['stdlib']}: name your own with `--data`.")
    name, _, config = args.data[0].partition(":")
    try:
        dataset = load_dataset(name, config or None, split="train")
    except (OSError, RuntimeError, ValueError) as error:
        raise ValueError(
            f"`--data {' '.join(args.data)}`: no text file has that name, lies in a folder of that name or matches it "
            f"as a pattern, and as a dataset on the Hub it could not be loaded: {error}"
        ) from error
    if args.text_column not in dataset.column_names:
        raise ValueError(f"`--text_column` must be one of {dataset.column_names}, got {args.text_column!r}.")
    return dataset.select_columns(args.text_column).rename_column(args.text_column, "text")


def split_documents(documents: Dataset, held_out: float) -> DatasetDict:
    """Hold out whole documents: the last ones, which are neighbours like those trained on. One alone is cut in two."""
    if len(documents) == 1:
        lines = documents[0]["text"].splitlines(keepends=True)
        cut = int(len(lines) * (1 - held_out))
        documents = Dataset.from_dict({"text": ["".join(lines[:cut]), "".join(lines[cut:])]})
    return documents.train_test_split(test_size=held_out, shuffle=False)


def train_tokenizer(documents: Dataset, vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE: it can write every text, and every token stands for a known number of bytes."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    sample = documents.select(range(min(len(documents), 20_000)))
    tokenizer.train_from_iterator((row["text"] for row in sample), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<|endoftext|>", eos_token="<|endoftext|>")


def make_contexts(documents: Dataset, tokenizer: PreTrainedTokenizerFast, length: int) -> Dataset:
    """Lay the documents end to end and cut them into contexts of `length` tokens.

    Most files are shorter than a context. What a long context has to offer are then the names and habits that the
    files of one folder share, so the documents keep their order: neighbours in a folder are neighbours in a context.
    """

    def tokenize(rows):
        return {"input_ids": [ids + [tokenizer.eos_token_id] for ids in tokenizer(rows["text"])["input_ids"]]}

    def cut(rows):
        tokens = [token for ids in rows["input_ids"] for token in ids]
        contexts = [tokens[i : i + length] for i in range(0, len(tokens) - length + 1, length)]
        return {"input_ids": contexts, "labels": contexts}

    tokens = documents.map(tokenize, batched=True, remove_columns="text", desc="Tokenize")
    return tokens.map(cut, batched=True, desc=f"Cut into contexts of {length} tokens")


def split_contexts(
    documents: DatasetDict, tokenizer: PreTrainedTokenizerFast, args: DataArguments
) -> tuple[Dataset, Dataset]:
    """Contexts to train on, and others to evaluate on."""
    contexts, held_out = (make_contexts(documents[name], tokenizer, args.context_length) for name in ("train", "test"))
    if not len(contexts) or not len(held_out):
        raise ValueError(
            f"The data fills {len(contexts)} contexts of {args.context_length} tokens for training and "
            f"{len(held_out)} for evaluation, where one is the least. Give more `--data`, a smaller "
            "`--context_length` or another `--held_out`."
        )
    return contexts, held_out.shuffle(seed=0).select(range(min(len(held_out), args.max_held_out_contexts)))


def bits_of_tokens(model: PreTrainedModel, held_out: Dataset, args: TrainingArguments, name: str) -> torch.Tensor:
    """Cross-entropy in bits of every held-out token but the first of each context: `[contexts, N - 1]`."""
    rows = tqdm(held_out.with_format("torch"), desc=f"Evaluate {name}")
    losses = [token_losses(model, row["input_ids"], 1, in_bf16=args.bf16)[0] for row in rows]
    return torch.stack(losses).double() / math.log(2)


def count_bytes(held_out: Dataset, tokenizer: PreTrainedTokenizerFast) -> torch.Tensor:
    """UTF-8 bytes that the tokens of `bits_of_tokens` stand for: byte-level BPE writes a byte as one character. The
    end of a document costs bits, and has no bytes."""
    tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    sizes = torch.tensor([0 if token in tokenizer.all_special_tokens else len(token) for token in tokens])
    return sizes[torch.tensor(held_out["input_ids"][:])][:, 1:]


def bits_per_byte(bits: torch.Tensor, num_bytes: torch.Tensor) -> dict[str, float]:
    """By position in the context, 1-63, 64-127, 128-255 and so on, and over all of it."""
    length = num_bytes.shape[1] + 1
    starts = [1] + [64 << i for i in range(length.bit_length()) if 64 << i < length]
    spans = {f"{a}-{b - 1}": slice(a - 1, b - 1) for a, b in zip(starts, starts[1:] + [length], strict=True)}
    spans["all"] = slice(None)
    return {name: (bits[:, span].sum() / num_bytes[:, span].sum()).item() for name, span in spans.items()}
