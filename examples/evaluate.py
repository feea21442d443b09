"""A report of what a causal language model makes of long texts, beside its baselines.

    python examples/evaluate.py --model HuggingFaceTB/SmolLM2-135M --data 'books/*.txt' --lengths 4096 16384 32768
    python examples/evaluate.py --model runs/tuned --beside before=runs/base --arms model --data 'books/*.txt'

Any causal language model of Transformers, with a LongNet's pattern or without. Into `--output_dir` come report.md,
report.json and pictures of

- the loss by position, and of tokens by whether and how far back they are copies: a token is one if the 3 (9) tokens
  before it and itself stood there before;
- the loss of the same last tokens of a text after more and more of what comes before them (true), of the same in
  random order (shuffled), and of another document (foreign): what true gains over foreign is use of the context;
- the same tokens' LongPPL (arXiv 2410.23771): the perplexity of those that gain much from a long context;
- which of 40 numbers are found when they are asked for at the end of a text, by their depth in it and its length. The
  right answers to earlier questions are given (teacher forcing);
- six tasks of RULER, at every length, see ruler.py.

Beside the model: the same weights with full attention, if they have a pattern, and with a sliding window and a sink,
of as many pairs of a text of the longest length (for a model with full attention: as many as the paper's pattern has);
other models (`--beside`), on the same texts; and chance. Differences are of text by text. Stopped, the same command
goes on where it was, unless texts or weights have become others meanwhile.
"""

import hashlib
import importlib
import json
import math
import statistics
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from measurements import (
    copy_distance,
    judge_answers,
    make_needles,
    pack,
    papers_pattern,
    token_losses,
    window_of_equal_work,
    window_of_pairs,
)
from record import Results, environment, peak_gibibytes
from report import write_report
from ruler import TASKS, make_tasks
from text_files import find_files, standard_library_files
from tqdm.auto import tqdm
from training import check_at_least, check_settings, stretched_positions
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    HfArgumentParser,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from longnet_hf import Branch, DilatedPattern, describe, set_dilated_attention


ARMS = {
    "model": "the model as it is",
    "full": "the same weights with full attention",
    "window": "the same weights with a sliding window and a sink of equal pairs",
}
SINK_TOKENS = 4
SHORTEST_PAPER = 16  # tokens that the paper's pattern can be made for
SHUFFLED_PART = 128  # tokens that stay together
CONTEXTS = ("true", "shuffled", "foreign")
COPY_CONTEXTS = (3, 9)
FULL = dict(segment_lengths=[None], dilation_rates=[1], branch_types=["window"])
# The fields of a pattern as they are where nothing is said, which the baselines put in the place of the model's
NO_PATTERN = dict(
    branch_types=None,
    head_offset="paper",
    segment_shift=False,
    full_attention_layers=None,
    full_attention_heads=None,
    sink_tokens=0,
)


@dataclass
class Arguments:
    """What is measured, on what."""

    model: str = field(default="HuggingFaceTB/SmolLM2-135M", metadata={"help": "A causal language model."})
    data: list[str] = field(
        default_factory=list, metadata={"help": "Text files, folders and patterns. Default: Python's own sources."}
    )
    lengths: list[int] = field(
        default_factory=lambda: [4096, 8192, 16384, 32768], metadata={"help": "Lengths of texts, in tokens."}
    )
    texts: int = field(default=8, metadata={"help": "Texts of the longest length."})
    needle_texts: int = field(
        default=10, metadata={"help": "Texts with 40 numbers each, at every length. 0: without numbers."}
    )
    ruler_texts: int = field(
        default=10, metadata={"help": "Texts of every task of RULER, at every length. 0: without RULER."}
    )
    target_tokens: int = field(
        default=2048,
        metadata={
            "help": "Tokens whose loss is measured after more context. Of patterns with segments, whole ones: fewer "
            "tokens would be the first of a segment, which see little."
        },
    )
    arms: list[str] = field(default_factory=lambda: list(ARMS), metadata={"help": f"Of {', '.join(ARMS)}."})
    beside: list[str] = field(
        default_factory=list,
        metadata={"help": "NAME=MODEL, other models of the same tokenizer, measured as they are."},
    )
    imports: list[str] = field(
        default_factory=list,
        metadata={"help": "Packages that know the models and tell Transformers when they are imported, such as fla."},
    )
    seed: int = field(default=0, metadata={"help": "Of numbers, their places and the order of shuffled parts."})
    device: str = field(default="cuda" if torch.cuda.is_available() else "cpu", metadata={"help": "Where to run."})
    output_dir: str = field(default="runs/evaluate", metadata={"help": "Folder of the report."})

    def __post_init__(self):
        self.lengths = sorted(set(self.lengths))
        unknown = [arm for arm in self.arms if arm not in ARMS]
        if unknown or "model" not in self.arms:
            raise ValueError(f"`--arms` must be `model` and others of {list(ARMS)}, got {self.arms}.")
        names = [entry.partition("=")[0] for entry in self.beside]
        for entry, name in zip(self.beside, names, strict=True):
            taken = (*ARMS, "settings", "self")
            if not (name.isidentifier() and entry.partition("=")[2]) or name in taken or names.count(name) > 1:
                raise ValueError(
                    f"`--beside` takes NAME=MODEL, with a name of letters, digits and underscores that is used once "
                    f"and is none of {list(taken)}, got {entry!r}."
                )
        check_at_least(self, texts=2, needle_texts=0, ruler_texts=0, target_tokens=1)
        for package in self.imports:
            try:
                importlib.import_module(package)
            except (ImportError, TypeError, ValueError) as error:  # of relative and empty names, too
                raise ValueError(f"`--imports` must name packages that are installed, got {package!r}.") from error
        if self.lengths[0] < 2:
            raise ValueError(f"`--lengths` must be of at least 2 tokens, got {self.lengths[0]}.")
        if 2 * self.target_tokens > self.lengths[-1]:
            raise ValueError(
                f"`--target_tokens` must be at most half of the longest of `--lengths`, {self.lengths[-1]}, got "
                f"{self.target_tokens}."
            )

    @property
    def others(self) -> dict[str, str]:
        """The models of `beside`, by their names."""
        return dict(entry.split("=", maxsplit=1) for entry in self.beside)


# Texts


def read_texts(args: Arguments, tokenizer) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Texts `[texts, N]` of the longest length, spread over the files, which are laid end to end; and for each the
    index of another text that shares no file with it, `[texts]`; None where a text has no such other."""
    files = sorted(find_files(args.data) if args.data else standard_library_files())
    if not files:
        raise ValueError(f"`--data` names no text file: {' '.join(args.data)}.")
    ids, owners = [], []
    for index, file in enumerate(tqdm(files, desc="Read")):
        of_file = tokenizer(file.read_text(encoding="utf-8", errors="replace"), add_special_tokens=False)["input_ids"]
        ids += of_file
        owners += [index] * len(of_file)
    length = args.lengths[-1]
    count = len(ids) // length
    if count < args.texts:
        raise ValueError(
            f"`--data` fills {count} texts of {length} tokens, and {args.texts} are needed: give more files, fewer "
            "`--texts` or shorter `--lengths`."
        )
    chosen = [i * count // args.texts for i in range(args.texts)]
    texts = torch.stack([torch.tensor(ids[i * length : (i + 1) * length]) for i in chosen])
    spans = [(owners[i * length], owners[(i + 1) * length - 1]) for i in chosen]
    foreign = []
    for i, (first, last) in enumerate(spans):
        order = [(i + step) % args.texts for step in range(1, args.texts)]
        others = [j for j in order if spans[j][0] > last or spans[j][1] < first]
        if not others:
            return texts, None
        foreign.append(others[0])
    return texts, torch.tensor(foreign)


class Material:
    """The texts, and what is made of them."""

    def __init__(self, args: Arguments, tokenizer):
        self.args, self.tokenizer = args, tokenizer
        self.texts, self.foreign = read_texts(args, tokenizer)
        self.contexts = CONTEXTS if self.foreign is not None else CONTEXTS[:2]
        self.near = min(2048, args.lengths[-1] // 2)
        added = tokenizer("a")["input_ids"]
        # What the model has seen at the start of every text, if its tokenizer puts it there
        self.first_token = tokenizer.bos_token_id if added and added[0] == tokenizer.bos_token_id else None

    def start(self, ids: torch.Tensor) -> torch.Tensor:
        """The same with the token in its first place that the model expects there."""
        if self.first_token is None:
            return ids
        return torch.cat([ids.new_tensor([self.first_token]), ids[1:]])

    @property
    def digest(self) -> str:
        """Of all texts as the models see them, and of which is foreign to which."""
        foreign = None if self.foreign is None else self.foreign.tolist()
        seen = json.dumps([[self.start(text).tolist() for text in self.texts], foreign])
        return hashlib.sha256(seen.encode()).hexdigest()

    @property
    def prefixes(self) -> list[int]:
        """Numbers of tokens of context: doubling up to all that there is."""
        most = self.args.lengths[-1] - self.args.target_tokens
        count = range(max(1, (most // self.args.target_tokens).bit_length()))
        return sorted({min(most, self.args.target_tokens << i) for i in count} | {most})

    def with_context(self, kind: str, index: int, prefix: int) -> torch.Tensor:
        """The last tokens of a text after `prefix` tokens of context of a kind."""
        targets, before = self.args.target_tokens, self.texts[index, : -self.args.target_tokens][-prefix:]
        if kind == "foreign":
            before = self.texts[self.foreign[index], -prefix:]
        if kind == "shuffled":
            parts = before.split(min(SHUFFLED_PART, max(1, prefix // 4)))
            generator = torch.Generator().manual_seed(self.args.seed + index)
            before = torch.cat([parts[i] for i in torch.randperm(len(parts), generator=generator)])
        return self.start(torch.cat([before, self.texts[index, -targets:]]))

    def edges(self, first: int) -> list[int]:
        """`first` and its doubles below the longest length."""
        return [first << i for i in range(64) if first << i < self.args.lengths[-1]]


def check_shortest(material: Material) -> None:
    """Refuse `--lengths` into which numbers and tasks do not fit, before hours of measuring rather than after them."""
    args, length = material.args, material.args.lengths[0]
    texts = material.texts[:, -length:]
    if args.needle_texts:
        make_needles(texts, material.tokenizer, args.needle_texts, args.seed)
    for task in TASKS if args.ruler_texts else ():
        make_tasks(task, material.tokenizer, length, texts, args.ruler_texts, args.seed)


# Measurements: each takes a model and gives what JSON can hold


def loss_of_texts(model: PreTrainedModel, material: Material, name: str) -> dict:
    """Loss of each text by position and by class of copies (`losses`); of a class that a text does not have, None."""
    length = material.args.lengths[-1]
    bounds = [1, *material.edges(64), length]
    position = {f"{a}-{b - 1}": [] for a, b in zip(bounds, bounds[1:], strict=False)}
    copies: dict = {context: {} for context in COPY_CONTEXTS}
    seconds = []
    for text in tqdm(material.texts, desc=f"{name}: losses"):
        ids = material.start(text)
        began = time.perf_counter()
        losses, _ = token_losses(model, ids, 1)
        seconds.append(time.perf_counter() - began)
        for key, (a, b) in zip(position, zip(bounds, bounds[1:], strict=False), strict=True):
            position[key].append(losses[a - 1 : b - 1].mean().item())
        for context in COPY_CONTEXTS:
            for key, is_in in copy_classes(copy_distance(ids, context)[1:], material).items():
                mean = losses[is_in].mean().item() if is_in.any() else None
                copies[context].setdefault(key, []).append(mean)
    speed = length / statistics.median(seconds[1:] or seconds)  # the first text may wait for kernels
    return {"losses": {"position": position, "copies": copies, "tokens_per_second": round(speed)}}


def copy_classes(distance: torch.Tensor, material: Material) -> dict[str, torch.Tensor]:
    """Which tokens are in which class of copies: new ones, near ones, and farther ones by doubling distances."""
    bounds = [1, *material.edges(material.near), material.args.lengths[-1]]
    classes = {"never": distance == 0}
    for a, b in zip(bounds, bounds[1:], strict=False):
        classes[f"{a}-{b - 1} back"] = (distance >= a) & (distance < b)
    return classes


def loss_after_context(model: PreTrainedModel, material: Material, name: str) -> dict:
    """For every kind of context and number of its tokens, the mean loss of the same tokens in each text (`contexts`);
    and the losses of these tokens after the shortest and the longest true context (`token_losses`)."""
    result: dict = {kind: {} for kind in material.contexts}
    of_tokens: dict[int, torch.Tensor] = {}
    cells = [(kind, prefix) for kind in material.contexts for prefix in material.prefixes]
    for kind, prefix in tqdm(cells, desc=f"{name}: contexts"):
        texts = [material.with_context(kind, index, prefix) for index in range(len(material.texts))]
        losses = torch.stack([token_losses(model, ids, prefix)[0] for ids in texts])
        result[kind][prefix] = losses.mean(1).tolist()
        if kind == "true":
            of_tokens[prefix] = losses
    ends = {"short": material.prefixes[0], "long": material.prefixes[-1]}
    return {"contexts": result, "token_losses": {which: pack(of_tokens[prefix]) for which, prefix in ends.items()}}


def find_needles(model: PreTrainedModel, material: Material, length: int, name: str) -> dict:
    """Of every number: its depth in the text before the questions (0 to 1), the distance from its question, whether it
    is found, and the log-probability of its tokens. `[texts][40]`."""
    args = material.args
    result: dict = {"depth": [], "distance": [], "found": [], "log_probability": []}
    needles = make_needles(material.texts[:, -length:], material.tokenizer, args.needle_texts, args.seed)
    for ids, answers, said in tqdm(needles, desc=f"{name}: numbers in {length}"):
        is_right, nats = judge_answers(model, material.start(ids), answers)
        first = torch.stack([answer[0] for answer in answers])
        result["depth"].append((said / first[0]).tolist())
        result["distance"].append((first - said).tolist())
        result["found"].append(is_right.int().tolist())
        result["log_probability"].append((-nats).tolist())
    return result


def answer_ruler(model: PreTrainedModel, material: Material, length: int, name: str) -> dict:
    """Of every task of RULER, and each of its texts: the share of right answers, the mean log-probability of an
    answer, and the share that one who draws from the candidates would have."""
    args, result = material.args, {}
    texts = material.texts[:, -length:]
    for task in tqdm(TASKS, desc=f"{name}: RULER in {length}"):
        of_task: dict = {"right": [], "log_probability": [], "chance": []}
        for ids, answers, chance in make_tasks(task, material.tokenizer, length, texts, args.ruler_texts, args.seed):
            is_right, nats = judge_answers(model, material.start(ids), answers)
            of_task["right"].append(is_right.double().mean().item())
            of_task["log_probability"].append(-nats.mean().item())
            of_task["chance"].append(chance)
        result[task] = of_task
    return result


# Arms


def dense_width(branches: list[Branch]) -> float:
    """How far back a head's attention has no gaps, in positions; of segments, to their boundary at most."""
    dense = [branch.length for branch in branches if branch.rate == 1 and branch.type != "sink"]
    return math.inf if None in dense else max(dense, default=0)


class ArmMissing(Exception):
    """Why a model has no such baseline."""


def plain_vocabulary(tokenizer) -> dict[str, int]:
    """The tokens that texts are made of: without those that were added, such as one for padding."""
    added = tokenizer.get_added_vocab()
    return {token: i for token, i in tokenizer.get_vocab().items() if token not in added}


def load_tokenizer(model: str, where: str) -> PreTrainedTokenizerBase:
    try:
        return AutoTokenizer.from_pretrained(model)
    except (ImportError, OSError, ValueError) as error:
        raise ValueError(f"{where} must be a model with its tokenizer, which could not be loaded: {error}") from error


def check_others(args: Arguments, tokenizer, results: Results) -> None:
    """Refuse models that cannot be measured beside the model, before anything is."""
    for name, model in args.others.items():
        where = named(name, args)
        other = load_tokenizer(model, where)
        if plain_vocabulary(other) != plain_vocabulary(tokenizer):
            raise ValueError(f"{where} must be a model of the tokenizer of `--model {args.model}`.")
        if other("a")["input_ids"] != tokenizer("a")["input_ids"]:
            raise ValueError(
                f"{where} must be a model of the tokenizer of `--model {args.model}`, with the same tokens around a "
                f"text: of 'a' it makes {other('a')['input_ids']}, not {tokenizer('a')['input_ids']}."
            )
        before = results.get(name, {}).get("of", model)
        if before != model:
            raise ValueError(f"{where}: in {args.output_dir} {name} is {before}; give another name or `--output_dir`.")
        longer_positions(AutoConfig.from_pretrained(model), args.lengths[-1], where)


def named(arm: str, args: Arguments) -> str:
    """The argument that names the model of an arm."""
    return f"`--beside {arm}={args.others[arm]}`" if arm in args.others else f"`--model {args.model}`"


def weights_of(model: str) -> str | None:
    """What changes with a model: its commit on the Hub, or a digest of the configuration and weights in a folder."""
    folder = Path(model)
    if not folder.is_dir():
        return AutoConfig.from_pretrained(model)._commit_hash
    config = AutoConfig.from_pretrained(model).to_diff_dict()
    config.pop("transformers_version", None)  # saved again, a model is the same
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for file in sorted([*folder.glob("*.safetensors"), *folder.glob("pytorch_model*.bin")]):
        digest.update(file.name.encode())
        with file.open("rb") as opened:
            while part := opened.read(1 << 24):
                digest.update(part)
    return digest.hexdigest()


def check_weights(args: Arguments, weights: dict[str, str | None], results: Results) -> None:
    """Refuse to set arms beside others whose models were not what they are now."""
    for arm, result in results.items():
        is_shown = arm in ARMS or arm in args.others
        if is_shown and "weights" in result and result["weights"] != weights[args.others.get(arm, args.model)]:
            raise ValueError(
                f"{named(arm, args)} has other weights, or another configuration, than when `{arm}` of "
                f"{args.output_dir} was measured: choose another `--output_dir`, or delete it."
            )


def longer_positions(config: PreTrainedConfig, longest: int, where: str) -> dict:
    """The fields with which a model's positions reach over the texts."""
    text_config = config.get_text_config()
    rope = getattr(text_config, "rope_parameters", None)
    native = getattr(text_config, "max_position_embeddings", None)
    if native is None or longest <= native or native < 1:  # below 1: without a bound
        return {}
    if not rope or "rope_type" not in rope:
        raise ValueError(
            f"`--lengths` must be at most {native} for {where}, whose positions cannot be stretched, got {longest}."
        )
    if text_config is not config:
        raise ValueError(
            f"`--lengths` must be at most {native} for {where}, which is not of text alone: the positions of its part "
            f"cannot be stretched from here, got {longest}."
        )
    return stretched_positions(text_config, longest, where)


def load_arm(arm: str, args: Arguments) -> tuple[PreTrainedModel, dict]:
    """The model of an arm, and what is said of it: its name, pairs per token and the width of its dense window, that
    of the heads that see least (None: all)."""
    longest, name, where = args.lengths[-1], args.others.get(arm, args.model), named(arm, args)
    if arm in args.others:
        arm = "model"
    config = AutoConfig.from_pretrained(name)
    text_config = config.get_text_config()
    has_pattern = hasattr(text_config, "layer_patterns") or hasattr(text_config, "dilated_attention")
    if arm == "full" and not has_pattern:
        raise ArmMissing("the model has its own attention, which no pattern has replaced")
    fields = longer_positions(config, longest, where)
    about: dict = {"of": name, "stretched": bool(fields)}
    dtype = torch.bfloat16 if args.device.startswith("cuda") else torch.float32

    pattern = FULL
    if arm == "window":
        if has_pattern:
            with torch.device("meta"):
                described = describe(AutoModelForCausalLM.from_config(config), longest)
            width = window_of_pairs(described.pairs_per_token, longest, SINK_TOKENS)
        elif longest < SHORTEST_PAPER:
            raise ValueError(
                f"`--lengths` must reach {SHORTEST_PAPER} tokens for the `window` of `--arms`, which has the pairs of "
                f"the paper's pattern, got {longest}."
            )
        else:
            width = window_of_equal_work(DilatedPattern(**papers_pattern(longest)), longest, SINK_TOKENS)
        pattern = dict(segment_lengths=[width], dilation_rates=[1], branch_types=["window"], sink_tokens=SINK_TOKENS)
    is_longnet = hasattr(text_config, "layer_patterns")
    if arm != "model" and is_longnet:
        fields |= NO_PATTERN | pattern
    model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, **fields).to(args.device).eval()
    if arm != "model" and not is_longnet:
        try:
            set_dilated_attention(model, **pattern)
        except ValueError as error:
            raise ArmMissing(str(error)) from error
    if arm == "model" and not has_pattern:
        # Sliding windows of its own are not counted: nothing is known of what another model's layers attend to
        return model, about | {"pairs": None, "dense_window": None}
    described = describe(model, longest)
    widths = [dense_width(head.branches) for layer in described.layers for head in layer.heads]
    window = None if min(widths) == math.inf else min(widths)
    return model, about | {"pairs": described.pairs_per_token, "dense_window": window}


def pieces_of(args: Arguments) -> list[str]:
    """What is measured of every arm, by the names it has in its results."""
    of_lengths = [kind for kind, texts in (("needles", args.needle_texts), ("ruler", args.ruler_texts)) if texts]
    return ["losses", "contexts", *(f"{kind}-{length}" for kind in of_lengths for length in args.lengths)]


def is_done(arm: str, args: Arguments, results: Results) -> bool:
    return all(piece in results.get(arm, {}) for piece in pieces_of(args))


def find_missing(arms: list[str], args: Arguments, results: Results) -> None:
    """Load every arm that is not measured, before hours of measuring rather than after them; and note in `results`
    why one is missing, each time anew."""
    for arm in arms:
        if is_done(arm, args, results):
            continue
        try:
            load_arm(arm, args)
        except ArmMissing as reason:
            print(f"{arm} is left out: {reason}")
            results.save(**{arm: {"missing": str(reason)}})
        else:
            if "missing" in results.get(arm, {}):
                results.save(**{arm: {}})


def measure_arm(arm: str, args: Arguments, material: Material, results: Results, weights: str | None) -> None:
    """Measure what is not in `results` yet, and save it there piece by piece."""
    if is_done(arm, args, results):
        print(f"{arm} is measured already.")
        return
    model, about = load_arm(arm, args)
    if args.device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(torch.device(args.device))
    done = results.get(arm, {})
    done |= {"vocabulary": model.config.get_text_config().vocab_size, "weights": weights} | about
    done |= environment(args.device)
    of_texts = {"losses": loss_of_texts, "contexts": loss_after_context}
    of_lengths = {"needles": find_needles, "ruler": answer_ruler}
    for piece in pieces_of(args):
        if piece not in done:
            kind, _, length = piece.partition("-")
            if kind in of_lengths:
                done[piece] = of_lengths[kind](model, material, int(length), arm)
            else:
                done |= of_texts[piece](model, material, arm)
            done["peak_gibibytes"] = max(done.get("peak_gibibytes", 0), peak_gibibytes(args.device))
            results.save(**{arm: done})


def main():
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer, results = load_tokenizer(args.model, f"`--model {args.model}`"), Results(folder / "report.json")
    check_others(args, tokenizer, results)
    material = Material(args, tokenizer)
    check_shortest(material)
    settings = asdict(args) | dict.fromkeys(("arms", "beside", "imports", "output_dir", "device"))
    settings["texts_sha256"] = material.digest
    check_settings(folder / "settings.json", settings)
    models = {arm: args.others.get(arm, args.model) for arm in (*ARMS, *args.others)}
    weights = {model: weights_of(model) for model in set(models.values())}
    check_weights(args, weights, results)
    arms = [*sorted(args.arms, key=list(ARMS).index), *args.others]
    find_missing(arms, args, results)
    results.save(settings=settings)
    for arm in arms:
        if "missing" not in results.get(arm, {}):
            measure_arm(arm, args, material, results, weights[models[arm]])
    words = ARMS | {name: f"{model} as it is" for name, model in args.others.items()}
    # Read again: JSON makes text of the keys. An arm that was stopped is not there, if it is not asked for again
    results = Results(folder / "report.json")
    words = {
        arm: what for arm, what in words.items() if "missing" in results.get(arm, {}) or is_done(arm, args, results)
    }
    write_report(args, words, results, folder)
    print(f"Written to {folder / 'report.md'}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("\nStopped. The same command goes on where it was.")
