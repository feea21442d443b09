"""What attention is worth to models that are trained with it from the start: curves at equal tokens and equal time.

    python benchmarks/from_scratch.py --data code='src/**/*.c' book='books/*.txt' --bf16 --arms paper window full

The models have the size of the paper's base model (12 layers, 768 wide), and contexts of 32 768 tokens.

Every arm starts from the same seed and sees the same contexts in the same order: the paper's pattern, the same shifted
in odd layers, a sliding window of its work with a sink, that with full attention in every fourth head, and full
attention; windows that keep one key in *r* far away, or one block of 64 keys in *r* (computed by FlexAttention; a GPU
is needed); and recurrent models of equal width and depth, DeltaNet and gated DeltaNet (`pip install
flash-linear-attention`; a GPU is needed, and for the gated one on a Hopper Triton 3.7.1 or tilelang). With
`--start_from` arms with attention go on from the weights of one of them.

Texts are held out of every kind; their loss is measured as training goes on, whose time is counted without these
measurements: of all tokens, and of those that repeat what stood further back than a sixteenth of the context. By
default the learning rate is constant after its warm-up, so that any point of a curve is as good as the end of a
shorter run.

Ends with a table, one of differences from the first arm in the order above, paired over contexts, a picture of the
curves, and a record in JSON. The models stay in `--output_dir`, for the report on what they make of long texts
(`examples/evaluate.py --model ...`, which knows nothing of blocks). Stopped, the same command goes on where it was.
"""

import contextlib
import copy
import functools
import itertools
import math
import sys
import time
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import matplotlib
import numpy as np
import torch
from common import dilated_windows, windows_of_blocks
from packaging.version import Version
from safetensors.torch import load_file, save_file
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.utils.data import Dataset
from transformers import (
    AutoTokenizer,
    HfArgumentParser,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    default_data_collator,
    set_seed,
)

from longnet_hf import DilatedPattern, LongNetConfig, LongNetForCausalLM, describe, modeling_longnet


sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))  # whose measurements and records it shares
from measurements import (  # noqa: E402
    copy_distance,
    papers_pattern,
    read_documents,
    read_texts,
    token_losses,
    window_of_equal_work,
)
from record import Results, environment, peak_gibibytes, read, write  # noqa: E402
from report import above, said, signed, table  # noqa: E402
from training import RESUME_WITH_SAME, check_at_least, check_settings, checkpoint_step, rows_per_step, train_on  # noqa: E402


matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402


ARMS = {
    "paper": "the paper's pattern",
    "shifted": "the same, shifted in odd layers",
    "window": "a sliding window of its work, and a sink",
    "window-heads": "the same, and full attention in every fourth head, from the first on",
    "full": "full attention",
    "windows": "windows of N/16, N/4 and N tokens that keep one key in 1, 4 and 16, and a sink",
    "windows-64": "the same, of one block of 64 keys in 1, 4 and 16",
    "deltanet": "DeltaNet (arXiv 2406.06484)",
    "gated-deltanet": "gated DeltaNet (arXiv 2412.06464)",
}
RECURRENT = "deltanet", "gated-deltanet"
SINK_TOKENS = 4
BLOCK = 64


def missing_for(arm: str) -> str | None:
    """What has to be installed to train a recurrent arm here."""
    if find_spec("fla") is None:
        return "`pip install flash-linear-attention`"
    is_hopper = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9
    if arm == "gated-deltanet" and is_hopper and find_spec("tilelang") is None:
        triton = version("triton")
        if Version("3.4") <= Version(triton) < Version("3.7.1"):  # flash-linear-attention says so in the backward pass
            return f"Triton 3.7.1 or tilelang on a Hopper GPU, where its gradients are wrong with Triton {triton}"
    return None


@dataclass
class Arguments:
    """What is trained, on what."""

    tokenizer: str = field(default="HuggingFaceTB/SmolLM2-135M", metadata={"help": "Whose tokenizer is used."})
    vocab_size: int | None = field(
        default=None,
        metadata={
            "help": "Learn a tokenizer of so many tokens, of the kind of `--tokenizer`, from the texts: the tables of "
            "a large one outweigh the layers of a small model."
        },
    )
    data: list[str] = field(default_factory=list, metadata={"help": "KIND=FILES, a pattern, for every kind of text."})
    arms: list[str] = field(
        default_factory=lambda: ["paper", "shifted", "window", "window-heads", "full"],
        metadata={"help": f"Of {', '.join(ARMS)}."},
    )
    context_length: int = field(default=32768, metadata={"help": "Tokens of a context."})
    held_out: int = field(default=4, metadata={"help": "Contexts of every kind that are not trained on."})
    hidden_size: int = field(default=768, metadata={"help": "Width of the models."})
    num_hidden_layers: int = field(default=12, metadata={"help": "Layers."})
    head_dim: int = field(default=64, metadata={"help": "Of an attention head."})
    start_from: str | None = field(
        default=None,
        metadata={
            "help": "The folder of a trained arm with attention, of these sizes, whose weights all arms start from. "
            "Give another `--seed` than that arm had: it orders the contexts."
        },
    )

    def __post_init__(self):
        unknown = [arm for arm in self.arms if arm not in ARMS]
        if unknown or not self.arms:
            raise ValueError(f"`--arms` must be of {list(ARMS)}, got {self.arms}.")
        for arm in self.arms:
            missing = missing_for(arm) if arm in RECURRENT else None
            if missing is not None:  # said before the other arms are trained
                raise ValueError(f"`--arms` has `{arm}`, which needs {missing}, got {self.arms}.")
        if self.start_from is not None:
            self._check_start()
        check_at_least(self, held_out=1)
        if self.vocab_size is not None:
            check_at_least(self, vocab_size=1)
        if self.hidden_size % self.head_dim:
            raise ValueError(f"`--head_dim` must divide {self.hidden_size} (`--hidden_size`), got {self.head_dim}.")

    def _check_start(self):
        file = Path(self.start_from, "config.json")
        if not file.exists() or set(RECURRENT) & set(self.arms):
            raise ValueError(
                "`--start_from` must be the folder of a trained arm with attention, as all `--arms` must be then, got "
                f"{self.start_from!r} and {self.arms}."
            )
        config = read(file)
        heads = self.hidden_size // self.head_dim
        sizes = dict(hidden_size=self.hidden_size, num_hidden_layers=self.num_hidden_layers, num_attention_heads=heads)
        for name, size in {"model_type": "longnet", **sizes}.items():
            if config.get(name) != size:
                raise ValueError(
                    f"`--start_from` must be a model of these sizes: {name} is {config.get(name)!r} in {file}, and "
                    f"{size!r} here."
                )


MEASURES = {"loss": "", "end": ", last quarter", "copies": ", copies from afar"}

DEFAULTS = dict(
    output_dir="runs/from_scratch",
    max_steps=4000,
    per_device_train_batch_size=1,
    learning_rate=6e-4,
    lr_scheduler_type="constant_with_warmup",
    warmup_steps=100,
    adam_beta2=0.98,
    weight_decay=0.01,
    max_grad_norm=1.0,
    gradient_checkpointing=True,
    logging_steps=10,
    eval_strategy="steps",
    eval_steps=200,
    save_steps=200,
    save_total_limit=1,
    report_to="none",
)


def make_tokenizer(args: Arguments, folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer that is named, or one of its kind for these texts, learned once."""
    named = AutoTokenizer.from_pretrained(args.tokenizer)
    if args.vocab_size is None:
        return named
    learned = folder / "tokenizer"
    if not learned.exists():
        texts = itertools.chain.from_iterable(read_documents(args.data).values())
        tokenizer = named.train_new_from_iterator(texts, args.vocab_size)
        if len(tokenizer) > args.vocab_size:
            raise ValueError(f"`--vocab_size` must be at least {len(tokenizer)} here, got {args.vocab_size}.")
        unfinished = learned.with_suffix(".unfinished")
        tokenizer.save_pretrained(unfinished)
        unfinished.replace(learned)
    return AutoTokenizer.from_pretrained(learned)


def read_contexts(args: Arguments, tokenizer, folder: Path) -> dict[str, torch.Tensor]:
    """Contexts `[contexts, N]` of every kind, tokenized once."""
    file = folder / "contexts.safetensors"
    if not file.exists():
        contexts = read_texts(args.data, tokenizer, args.context_length, args.held_out + 1)
        unfinished = file.with_suffix(".unfinished")
        save_file({kind: ids.to(torch.int32) for kind, ids in contexts.items()}, unfinished)
        unfinished.replace(file)
    return load_file(file)


def attention_of(arm: str, args: Arguments) -> dict:
    """The fields of a LongNet for an arm."""
    paper = papers_pattern(args.context_length)
    if arm in ("paper", "shifted"):
        return paper | {"segment_shift": arm == "shifted"}
    if arm.startswith("windows"):
        return dilated_windows(args.context_length) | {"sink_tokens": SINK_TOKENS}
    width = None if arm == "full" else window_of_equal_work(DilatedPattern(**paper), args.context_length, SINK_TOKENS)
    fields = dict(segment_lengths=[width], dilation_rates=[1], branch_types=["window"])
    if arm == "full":
        return fields
    fields["sink_tokens"] = SINK_TOKENS
    if arm == "window-heads":
        heads = args.hidden_size // args.head_dim
        full = list(range(0, heads, 4))
        fields["full_attention_heads"] = dict.fromkeys(range(args.num_hidden_layers), full)
    return fields


def make_model(arm: str, args: Arguments, vocabulary: int) -> PreTrainedModel:
    shape = dict(
        vocab_size=vocabulary,
        hidden_size=args.hidden_size,
        num_hidden_layers=args.num_hidden_layers,
        max_position_embeddings=args.context_length,
        tie_word_embeddings=True,
        use_cache=False,
    )
    if arm not in RECURRENT:
        heads = args.hidden_size // args.head_dim
        fields = dict(num_attention_heads=heads, intermediate_size=4 * args.hidden_size, **attention_of(arm, args))
        config = LongNetConfig(**shape, **fields)
        if args.start_from is not None:
            return LongNetForCausalLM.from_pretrained(args.start_from, config=config, dtype=torch.float32)
        return LongNetForCausalLM(config)
    from fla.models import DeltaNetConfig, DeltaNetForCausalLM, GatedDeltaNetConfig, GatedDeltaNetForCausalLM

    # As many weights as the attention of the others; of the gated one that makes keys of half the width
    if arm == "deltanet":
        heads = max(n for n in range(1, max(1, args.hidden_size // 128) + 1) if args.hidden_size % n == 0)
        return DeltaNetForCausalLM(DeltaNetConfig(**shape, num_heads=heads))
    heads = max(1, args.hidden_size // 192)
    return GatedDeltaNetForCausalLM(GatedDeltaNetConfig(**shape, num_heads=heads, head_dim=96, expand_v=2))


@functools.lru_cache(maxsize=64)
def flex_inputs(pattern: DilatedPattern, heads: int, length: int, block: int, device: torch.device) -> dict:
    """What FlexAttention takes for `windows_of_blocks`."""
    count = windows_of_blocks(pattern, heads, block, SINK_TOKENS, device)
    mask = create_block_mask(
        lambda b, h, n, m: count(n, m, h) > 0,
        *(None, heads, length, length),
        device=device,
        _compile=device.type == "cuda",  # else it takes N² numbers
    )
    return dict(block_mask=mask, score_mod=lambda score, b, h, n, m: score + count(n, m, h).to(torch.float32).log())


flex = torch.compile(flex_attention, dynamic=False)


def attend_to_blocks(module, query, key, value, layout, scaling, block: int = BLOCK, attend=flex, **kwargs):
    """Attention of a LongNet with windows, of one text a row, that keeps blocks of keys."""
    query, key = query.to(value.dtype), key.to(value.dtype)
    inputs = flex_inputs(module.pattern, key.shape[1], key.shape[2], block, key.device)
    return attend(query, key, value, scale=scaling, **inputs).transpose(1, 2), None


@contextlib.contextmanager
def attention_function(arm: str):
    """Lets LongNets attend as an arm does."""
    functions = modeling_longnet.ALL_ATTENTION_FUNCTIONS
    own = dict.fromkeys(("dilated", "sdpa"), attend_to_blocks) if arm == "windows-64" else {}
    before = {name: functions[name] for name in own}
    functions.update(own)
    try:
        yield
    finally:
        functions.update(before)


class Contexts(Dataset):
    """Contexts as Trainer takes them."""

    def __init__(self, contexts: list[torch.Tensor]):
        self.contexts = contexts

    def __len__(self) -> int:
        return len(self.contexts)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = self.contexts[index].long()
        return {"input_ids": ids, "labels": ids}


class CurveTrainer(Trainer):
    """Measures the loss of held-out contexts, and keeps it with the tokens and the seconds of training until then.

    Args:
        held_out: contexts `[contexts, N]` by kind.
        results: takes the curve: steps, tokens, seconds, and for every measure the mean losses of the contexts, by
            kind: of all tokens ("loss"), of the last quarter ("end"), and of those that repeat, after the same three
            tokens, what stood further back than N / 16 ("copies"; None where there are none).
    """

    def __init__(self, *args, held_out: dict[str, torch.Tensor], results: Results, **kwargs):
        super().__init__(*args, **kwargs)
        self.held_out, self.results = held_out, results
        far = next(iter(held_out.values())).shape[1] // 16
        self.are_copies = {kind: [copy_distance(ids)[1:] > far for ids in held_out[kind]] for kind in held_out}
        self.begin = None  # not in training: a run that was stopped behind its last step is not trained again

    def train(self, resume_from_checkpoint=None, **kwargs):
        step = checkpoint_step(Path(resume_from_checkpoint)) if resume_from_checkpoint else 0
        self.results.save(curve=[point for point in self.results.get("curve", []) if point["step"] <= step])
        self.begin = time.perf_counter()
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    def evaluate(self, *args, **kwargs) -> dict[str, float]:
        if self.args.device.type == "cuda":
            torch.cuda.synchronize()
        step, curve = self.state.global_step, self.results.get("curve", [])
        seconds = curve[-1]["seconds"] if curve else 0.0
        if self.begin is not None:
            seconds += time.perf_counter() - self.begin
        self.model.eval()
        batch_size = rows_per_step(self.args)
        length = next(iter(self.held_out.values())).shape[1]
        point = {"step": step, "tokens": step * batch_size * length, "seconds": round(seconds, 3)}
        point |= {measure: {} for measure in MEASURES}
        for kind, contexts in self.held_out.items():
            losses = [token_losses(self.model, ids.long(), 1)[0] for ids in contexts]
            copies = [x[are] for x, are in zip(losses, self.are_copies[kind], strict=True)]
            point["loss"][kind] = [x.mean().item() for x in losses]
            point["end"][kind] = [x[-length // 4 :].mean().item() for x in losses]
            point["copies"][kind] = [x.mean().item() if len(x) else None for x in copies]
        before = [point for point in curve if point["step"] < step]  # Trainer may ask twice at its end
        self.results.save(curve=[*before, point])
        metrics = {f"eval_loss_{kind}": float(np.mean(losses)) for kind, losses in point["loss"].items()}
        self.log(metrics)
        self.model.train()
        self.begin = time.perf_counter()
        return metrics


def run_arm(arm: str, args: Arguments, training_args: TrainingArguments, contexts: dict, tokenizer) -> None:
    """Train an arm, into a folder of its own."""
    folder = Path(training_args.output_dir) / arm
    folder.mkdir(parents=True, exist_ok=True)
    results = Results(folder / "result.json")
    if "parameters" in results:
        print(f"{arm} is done already.")
        return
    print(f"\n{arm}: {ARMS[arm]}", flush=True)
    set_seed(training_args.seed)
    model = make_model(arm, args, vocabulary=math.ceil(len(tokenizer) / 64) * 64)
    to_train = [ids for of_kind in contexts.values() for ids in of_kind[args.held_out :]]
    training_args = copy.copy(training_args)
    training_args.output_dir = str(folder)
    trainer = CurveTrainer(
        model,
        training_args,
        default_data_collator,
        Contexts(to_train),
        eval_dataset=[{}],  # `evaluate` has its own
        processing_class=tokenizer,
        held_out={kind: of_kind[: args.held_out] for kind, of_kind in contexts.items()},
        results=results,
    )
    train_on(trainer, folder)
    if not results["curve"] or results["curve"][-1]["step"] < trainer.state.global_step:
        trainer.evaluate()
    trainer.save_model(str(folder))
    pairs = None if arm in RECURRENT else round(describe(model, args.context_length).pairs_per_token)
    results.save(
        parameters=model.num_parameters(),
        pairs=pairs,
        peak_gibibytes=peak_gibibytes(training_args.device.type),
        **environment(training_args.device.type),
    )


def at_time(curve: list[dict], seconds: float, kind: str) -> float:
    """The loss of a curve after so many seconds of training, between the points around it; NaN before the first."""
    times, losses = [point["seconds"] for point in curve], [np.mean(point["loss"][kind]) for point in curve]
    return float(np.interp(seconds, times, losses, left=math.nan))


def write_results(results: dict[str, dict], kinds: list[str], folder: Path) -> None:
    """Tables and a picture of all arms, at equal tokens and at equal time."""
    tokens = min(result["curve"][-1]["tokens"] for result in results.values())
    seconds = min(result["curve"][-1]["seconds"] for result in results.values())
    rows, differences, ends = [], [], []
    measures = [(kind, measure) for kind in kinds for measure in MEASURES]
    for arm, result in results.items():
        end = next(point for point in result["curve"] if point["tokens"] >= tokens)
        ends.append(end)
        losses = [said(end[measure][kind]).partition(" ")[0] for kind, measure in measures]
        in_time = [said([at_time(result["curve"], seconds, kind)]) for kind in kinds]
        speed = end["tokens"] / max(end["seconds"], 1e-9)
        about = (f"{result['parameters'] / 1e6:.0f} M", result["pairs"] or "", f"{speed:.0f}")
        rows.append([f"`{arm}`: {ARMS[arm]}", *about, f"{result['peak_gibibytes']:.1f}", *losses, *in_time])
        differences.append([f"`{arm}`", *(signed(above(end[x][kind], ends[0][x][kind])) for kind, x in measures)])
    head = ["attention", "parameters", "pairs per token", "tokens/s", "GiB"]
    names = [f"{kind}{MEASURES[measure]}" for kind, measure in measures]
    in_time = [f"{kind} after {seconds:.0f} s" for kind in kinds]
    print(f"\nHeld-out loss in nats per token after {tokens} tokens, and after {seconds:.0f} s of training\n")
    print(table([*head, *names, *in_time], rows), flush=True)
    if len(differences) > 1:
        print(
            f"\nAfter {tokens} tokens, above `{next(iter(results))}` on the same contexts: means of one run each, ± "
            "one standard error over the contexts\n"
        )
        print(table(["attention", *names], differences[1:]), flush=True)

    figure, panels = plt.subplots(len(kinds), 2, figsize=(10, 4 * len(kinds)), squeeze=False, layout="constrained")
    for kind, (by_tokens, by_time) in zip(kinds, panels, strict=True):
        for arm, result in results.items():
            losses = [np.mean(point["loss"][kind]) for point in result["curve"]]
            by_tokens.plot([point["tokens"] / 1e6 for point in result["curve"]], losses, label=arm)
            by_time.plot([point["seconds"] / 60 for point in result["curve"]], losses, label=arm)
        by_tokens.set(xlabel="million tokens", ylabel=f"held-out loss (nats), {kind}")
        by_time.set(xlabel="minutes of training")
        by_tokens.legend()
    figure.savefig(folder / "curves.png", dpi=110)
    plt.close(figure)


def main():
    parser = HfArgumentParser((Arguments, TrainingArguments))
    parser.set_defaults(**DEFAULTS)
    args, training_args = parser.parse_args_into_dataclasses()
    folder = Path(training_args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    if training_args.save_steps != training_args.eval_steps:
        raise ValueError(
            f"`--save_steps` must be {training_args.eval_steps}, as `--eval_steps` is, so that a run which goes on "
            f"knows what it has measured; got {training_args.save_steps}."
        )
    for arm in args.arms:
        if arm in ("windows-64", *RECURRENT) and training_args.device.type != "cuda":
            raise ValueError(f"`--arms` has `{arm}`, which needs a GPU to be trained, got {training_args.device}.")
        if arm in RECURRENT and not (training_args.bf16 or training_args.fp16):
            raise ValueError(f"`--arms` has `{arm}`, whose kernels take 16 bits: give `--bf16` or `--fp16`.")
    names = (*RESUME_WITH_SAME, "eval_steps", "lr_scheduler_kwargs")
    settings = asdict(args) | {name: getattr(training_args, name) for name in names}
    settings |= {"arms": None, "measures": list(MEASURES)}  # of older results, there is less
    check_settings(folder / "settings.json", settings)
    tokenizer = make_tokenizer(args, folder)
    contexts = read_contexts(args, tokenizer, folder)
    for arm in args.arms:
        with attention_function(arm):
            run_arm(arm, args, training_args, contexts, tokenizer)
        if training_args.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
    results = {arm: Results(folder / arm / "result.json") for arm in ARMS}
    results = {arm: result for arm, result in results.items() if "parameters" in result}
    write(folder / "record.json", {"settings": settings, "results": results})
    write_results(results, list(contexts), folder)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("\nStopped. The same command goes on where it was.")
