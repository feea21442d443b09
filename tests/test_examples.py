"""The examples, and the studies of heads, run, resume and refuse as their users expect, in miniature."""

import functools
import importlib
import io
import itertools
import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from processes import HANG_LIMIT
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import BpeTrainer
from torch.nn.attention.flex_attention import flex_attention
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    CohereConfig,
    Gemma2Config,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PhiConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    XLNetConfig,
)
from transformers.modeling_outputs import CausalLMOutput

from longnet_hf import (
    DilatedPattern,
    LongNetConfig,
    LongNetForCausalLM,
    describe,
    dilated_attention_reference,
    set_dilated_attention,
)


pytest.importorskip("datasets"), pytest.importorskip("matplotlib")
ROOT = Path(__file__).parent.parent
TINY = (
    *("--vocab_size", "300", "--hidden_size", "16", "--intermediate_size", "32", "--num_hidden_layers", "1"),
    *("--num_attention_heads", "2", "--segment_lengths", "16", "64", "--dilation_rates", "1", "2"),
    *("--context_length", "128", "--max_held_out_contexts", "2", "--save_steps", "2", "--logging_steps", "1"),
    *("--use_cpu", "--report_to", "none", "--disable_tqdm", "true"),
)


def run(script, *arguments, folder, of="examples"):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HOME": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / of / script), *map(str, arguments)]
    options = dict(capture_output=True, text=True, timeout=HANG_LIMIT)
    return subprocess.run(command, cwd=folder, env=environment, **options)


def test_a_classifier_of_slides_is_trained_and_its_heat_map_drawn(tmp_path):
    tiny = ("--slides", 8, "--held_out", 4, "--tiles", 40, "--feature_size", 12, "--num_train_epochs", 1)
    quiet = ("--use_cpu", "--report_to", "none", "--disable_tqdm", "true")
    done = run("slide.py", *tiny, *quiet, "--output_dir", "run", folder=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert set(results) == {"accuracy", "heat_finds_sign"} and all(0 <= x <= 1 for x in results.values())
    assert (tmp_path / "run" / "heat_map.png").stat().st_size > 10_000
    assert (tmp_path / "run" / "model" / "modeling_longnet_slide.py").exists()


def test_parameters_of_a_slides_classifier_learn_slower_towards_the_embeddings(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(ROOT / "examples")
    slide = importlib.import_module("slide")
    slide.make_model(slide.SlideArguments()).model.save_pretrained(tmp_path)
    model = slide.make_model(slide.SlideArguments(encoder=str(tmp_path), drop_path=0.3))
    assert model.config.drop_path_rate == 0.3 and model.score.weight.shape == (2, 64)
    groups = slide.layer_decay_groups(model, SimpleNamespace(learning_rate=1.0, weight_decay=0.1), 0.5)
    group_of = {id(weight): group for group in groups for weight in group["params"]}
    assert len(group_of) == len(list(model.parameters()))
    for name, weight in model.named_parameters():
        layer = re.search(r"layers\.(\d)", name)
        depth = int(layer[1]) + 1 if layer else 0 if "embeddings" in name else 4
        assert group_of[id(weight)]["lr"] == 0.5 ** (4 - depth), name
        is_matrix = weight.dim() == 2
        assert group_of[id(weight)]["weight_decay"] == (0.1 if is_matrix else 0.0), name
    signs = [slide.make_slide(index, 12, 40, 4.0)["sign"].sum() for index in range(4)]
    assert signs == [0, 9, 0, 9]
    assert slide.rank_of_sign(np.array([3.0, 1, 2]), np.array([True, False, False])) == 1
    assert slide.rank_of_sign(np.array([1.5, 1, 2]), np.array([True, False, False])) == 0.5


def test_training_goes_on_where_it_was_stopped(tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    for i, path in enumerate(sorted((ROOT / "longnet_hf").glob("*.py"))):
        (data / f"{i}.txt").write_text(path.read_text())
    common = ("--data", data, "--output_dir", "run", "--max_steps", 4, "--held_out", 0.3, *TINY)
    done = run("train.py", *common, folder=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "bits per byte, by position" in done.stdout and "64-127" in done.stdout
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert set(results) == {"longnet", "local-only"}
    assert (tmp_path / "run" / "loss_by_position.png").stat().st_size > 10_000
    assert (tmp_path / "run" / "longnet" / "modeling_longnet.py").exists()

    # as if the first model had been stopped after its second step
    trained = tmp_path / "run" / "longnet"
    (trained / "train_results.json").unlink()
    state = trained / "checkpoint-4" / "trainer_state.json"
    state.write_text(state.read_text()[:100])  # stopped while it was written
    done = run("train.py", *common, folder=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "checkpoint-2" in done.stdout
    again = json.loads((tmp_path / "run" / "results.json").read_text())
    for name in results:
        assert again[name]["bits_per_byte"] == pytest.approx(results[name]["bits_per_byte"], rel=1e-6)

    refused = run("train.py", *common, "--learning_rate", 0.5, folder=tmp_path)
    assert refused.returncode != 0 and "learning_rate was 0.01, is 0.5" in refused.stderr


def test_files_are_whole_or_named(monkeypatch, tmp_path):
    """An interruption leaves what was there before; what another program left half-written is named."""
    monkeypatch.syspath_prepend(ROOT / "examples")
    record, training = importlib.import_module("record"), importlib.import_module("training")
    file, settings = tmp_path / "run" / "settings.json", {"seed": 1, "lengths": [1, 2]}
    training.check_settings(file, settings)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", lambda path, *args, **kwargs: path.write_bytes(b'{"se') and 1 / 0)
        for write in (lambda: training.check_settings(file, settings), lambda: record.write(file, {"seed": 2})):
            with pytest.raises(ZeroDivisionError):
                write()
    assert record.read(file) == settings
    training.check_settings(file, settings | {"seed": 3})  # of a run that was refused for its settings
    training.check_settings(file, settings)
    (file.parent / "results.json").write_text("{}")
    training.check_settings(file, settings)
    with pytest.raises(ValueError, match="seed was 1, is 2"):
        training.check_settings(file, settings | {"seed": 2})
    file.write_text(file.read_text()[:-5])
    for read in (lambda: training.check_settings(file, settings), lambda: record.Results(file)):
        with pytest.raises(ValueError, match="settings.json is damaged, delete it"):
            read()

    for step, state in ((2, "{}"), (10, '{"global_step": 1'), (30, ""), (4, '{"x": 1}')):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(state)
    (tmp_path / "checkpoint-50").mkdir()
    assert training.last_checkpoint(tmp_path).name == "checkpoint-4"


def test_stretched_positions_leave_the_rest_of_a_models_rotation_as_it_is(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(ROOT / "examples")
    stretched = importlib.import_module("training").stretched_positions
    shape = dict(vocab_size=50, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    shape |= dict(max_position_embeddings=64)
    for config in (GPTNeoXConfig(**shape), PhiConfig(**shape)):
        model = AutoModelForCausalLM.from_config(config)
        model.save_pretrained(tmp_path)
        fields = stretched(config, 256)
        longer = AutoModelForCausalLM.from_pretrained(tmp_path, **fields)
        assert fields["rope_parameters"].items() >= (config.rope_parameters | {"rope_type": "yarn"}).items()
        assert longer.base_model.rotary_emb.inv_freq.shape == model.base_model.rotary_emb.inv_freq.shape
        assert longer(torch.arange(100)[None] % 50).logits.isfinite().all()
    config.rope_parameters["rope_type"] = "linear"
    with pytest.raises(ValueError, match="^`--beside a=b` scales its rotary positions already .linear.: .* 64 tokens"):
        stretched(config, 256, "`--beside a=b`")
    assert stretched(XLNetConfig(), 10**6) == {}  # -1: without a bound


def test_data_that_is_not_there_is_named(tmp_path):
    done = run("train.py", "--data", "no/such/file.txt", *TINY, folder=tmp_path)
    assert done.returncode != 0 and "no/such/file.txt" in done.stderr


def test_what_measures_needs_no_datasets():
    """Which serves the examples that train, by corpus.py. Transformers itself imports it where it is installed."""
    program = "import sys, attention_map, evaluate, pretrained; sys.exit('corpus' in sys.modules)"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "examples")))}
    subprocess.run([sys.executable, "-c", program], env=environment, check=True)


@pytest.mark.parametrize(
    "script, name, wrong",
    [
        ("corpus", "DataArguments", dict(context_length=1)),
        ("corpus", "DataArguments", dict(max_held_out_contexts=0)),
        ("corpus", "DataArguments", dict(held_out=0.0)),
        ("corpus", "DataArguments", dict(held_out=1.5)),
        ("lora", "Arguments", dict(context_length=512, max_held_out_contexts=0)),
        ("lora", "Arguments", dict(context_length=512, lora_rank=0)),
        ("slide", "SlideArguments", dict(held_out=1)),
        ("slide", "SlideArguments", dict(slides=0)),
        ("slide", "SlideArguments", dict(tiles=0)),
        ("lora_on_the_prompt", "Arguments", dict(max_new_tokens=0)),
        ("lora_on_the_prompt", "Arguments", dict(shortest=0)),
        ("lora_on_the_prompt", "Arguments", dict(passes=0)),
        ("one_billion_tokens", "Arguments", dict(chunk_size=0)),
        ("one_billion_tokens", "Arguments", dict(tokens="0")),
        ("one_billion_tokens", "Arguments", dict(size="tiny")),
        ("one_billion_tokens", "Arguments", dict(save_every=0)),
        ("evaluate", "Arguments", dict(imports=["nope.sub"])),
        ("evaluate", "Arguments", dict(imports=[".relative"])),
        ("from_scratch", "Arguments", dict(vocab_size=0)),
    ],
)
def test_wrong_options_are_refused_before_any_work(script, name, wrong, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks"), monkeypatch.syspath_prepend(ROOT / "examples")
    option, value = list(wrong.items())[-1]
    shown = re.escape(repr(value[0] if isinstance(value, list) else value))
    with pytest.raises(ValueError, match=rf"`--{option}` must .*, got {shown}\."):
        getattr(importlib.import_module(script), name)(**wrong)


def test_the_picture_of_the_readme(tmp_path):
    done = run("draw_pattern.py", "--output", "pattern.png", folder=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "pattern.png").read_bytes()[:4] == b"\x89PNG"


def test_a_stream_goes_on_where_it_was_stopped(tmp_path):
    common = ("--tokens", "40_000", "--size", "small", "--chunk_size", 4096, "--segment_length", 256)
    caches = []
    for folder, stops in (("whole", ()), ("stopped", (("--stop_after", 0),))):
        for stop in (*stops, ()):
            done = run("one_billion_tokens.py", *common, "--output_dir", folder, *stop, folder=tmp_path)
            assert done.returncode == 0, done.stderr[-2000:]
        (tmp_path / folder / "record.json").unlink()  # and once more when there is nothing left to read
        for left in ("cache_4096.safetensors", "cache_8192.safetensors.unfinished"):  # by an interruption
            (tmp_path / folder / left).write_bytes(b"")
        again = run("one_billion_tokens.py", *common, "--output_dir", folder, folder=tmp_path)
        assert again.returncode == 0, again.stderr[-2000:]
        record = json.loads((tmp_path / folder / "record.json").read_text())
        assert record["tokens"] == 40_000 and record["branches"][-1][0] == 40_960
        (file,) = (tmp_path / folder).glob("cache_*")
        caches.append(load_file(file))
    assert "Going on at token 4,096" in done.stdout
    assert all(torch.equal(x, caches[1][name]) for name, x in caches[0].items())


@pytest.fixture(scope="module")
def tiny_llama(tmp_path_factory):
    """A model and its tokenizer, byte-level as SmolLM2's."""
    folder = tmp_path_factory.mktemp("llama")
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.train_from_iterator([], BpeTrainer(special_tokens=["<end>"], initial_alphabet=ByteLevel.alphabet()))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", bos_token="<end>").save_pretrained(folder)
    shape = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=5, num_attention_heads=2)
    config = LlamaConfig(vocab_size=300, max_position_embeddings=64, tie_word_embeddings=True, **shape)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def test_heads_are_compared_and_the_comparison_goes_on_where_it_was_stopped(tiny_llama, tmp_path):
    """Texts of this package, in bytes: 40 numbers take three thousand of them."""
    data = f"code={ROOT / 'longnet_hf' / 'dilated_*.py'}", f"docs={ROOT / 'docs' / '*.md'}"
    common = (
        *("--model", tiny_llama, "--data", *data, "--context_length", 4096, "--texts", 2, "--needle_texts", 1),
        *("--lora_rank", 2, "--max_steps", 2, "--save_steps", 1, "--save_total_limit", 99, "--output_dir", "run"),
        *("--use_cpu", "--report_to", "none", "--disable_tqdm", "true"),
    )
    compare = functools.partial(run, "pretrained_heads.py", of="benchmarks")
    arms = ("--arms", "full", "heads-20", "dilated-20", "--train_arms", "full")
    done = compare(*common, *arms, folder=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "docs, before training" in done.stdout and "code, after training" in done.stdout
    results = json.loads((tmp_path / "run" / "record.json").read_text())["results"]
    assert set(results) == {"full", "heads-20", "dilated-20"} and "after" not in results["heads-20"]
    measured = results["full"]["before"]["docs"]
    assert len(measured["losses"]["all"]) == 2 and len(measured["found"]) == 1
    assert results["full"]["pairs"] == 2048 > results["heads-20"]["pairs"] > results["heads-20"]["pairs"] // 2
    assert "commit" in results["full"]["longnet_hf"] and results["full"]["tokens_per_second"] > 0
    assert (tmp_path / "run" / "ranking.png").stat().st_size > 10_000

    # as if it had been stopped in training, after its first step
    result_file = tmp_path / "run" / "full" / "result.json"
    after = results["full"]["after"]["code"]["losses"]["all"]
    result_file.write_text(json.dumps({name: x for name, x in results["full"].items() if name != "after"}))
    for path in (tmp_path / "run" / "full" / "checkpoint-2").iterdir():
        path.unlink()
    done = compare(*common, *arms, folder=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("is measured already") == 3 and "Going on from" in done.stdout
    again = json.loads(result_file.read_text())["after"]["code"]["losses"]["all"]
    assert again == pytest.approx(after, rel=1e-6)

    wrong = ("--arms", "full", "dense"), ("--context_length", 1024), ("--data", "code=nothing.txt")
    for arguments, words in zip(wrong, ("'dense'", "must be longer", "names no file"), strict=True):
        refused = compare(*common, *arguments, "--output_dir", f"other-{arguments[0]}", folder=tmp_path)
        assert refused.returncode != 0 and words in refused.stderr


def test_blocks_that_are_chosen_are_compared_and_the_comparison_goes_on(tiny_llama, tmp_path):
    common = (
        *("--model", tiny_llama, "--data", f"code={ROOT / 'longnet_hf' / 'dilated_*.py'}", "--context_length", 4096),
        *("--texts", 1, "--needle_texts", 1, "--use_cpu", "--window", 64, "--share", 10),
        *("--other_window", 4096),
    )
    compare = functools.partial(run, "selected_blocks.py", *common, of="benchmarks", folder=tmp_path)
    done = compare("--output_dir", "run", "--arms", "all-keys", "learned-2/avg-2/keys-256")
    assert done.returncode == 0, done.stderr[-2000:]
    done = compare("--output_dir", "run", "--arms", "all-keys", "dilated-8")
    assert done.returncode == 0, done.stderr[-2000:]
    assert "| learned-2/avg-2/keys-256 | 0.062 |" in done.stdout and "learned-2/avg-2/keys-256\n" not in done.stdout
    record = (tmp_path / "run" / "record.json").read_text()
    results = json.loads(record, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))["results"]
    assert list(results) == ["all-keys", "learned-2/avg-2/keys-256", "dilated-8"] and "nan" not in done.stdout
    measured = results["learned-2/avg-2/keys-256"]["measured"]["code"]
    assert measured.pop("found_far") == [None]  # there are none
    assert all(len(x) == 1 and math.isfinite(x[0]) for x in measured.values())
    assert 200 < results["learned-2/avg-2/keys-256"]["keys_chosen"] <= 256
    assert "commit" in results["all-keys"]["longnet_hf"]


class CopyingOracle(PreTrainedModel):
    """Continues as the text went on where the last 12 tokens stood last, if that is not further back than `window`."""

    config_class = LlamaConfig

    def __init__(self, config, window=None):
        super().__init__(config)
        self.window, self.weight = window, torch.nn.Parameter(torch.zeros(1))

    def get_output_embeddings(self):
        return None

    def forward(self, input_ids, use_cache=None):
        tokens, last = input_ids[0].tolist(), {}
        logits = torch.zeros(1, len(tokens), self.config.vocab_size)
        for t in range(11, len(tokens)):
            key = tuple(tokens[t - 11 : t + 1])
            found = last.get(key)
            if found is not None and (self.window is None or t - found < self.window):
                logits[0, t, tokens[found + 1]] = 30.0
            last[key] = t
        return CausalLMOutput(logits=logits)


@pytest.fixture
def evaluation(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "examples")
    modules = dict(report="evaluate", of="measurements", written="report", ruler="ruler")
    return SimpleNamespace(**{name: importlib.import_module(module) for name, module in modules.items()})


def small_material(evaluation, tiny_llama, **changes):
    fields = dict(
        model=str(tiny_llama), data=[str(ROOT / "longnet_hf")], lengths=[6000], texts=3, needle_texts=2,
        target_tokens=500, device="cpu",
    )  # fmt: skip
    args = evaluation.report.Arguments(**(fields | changes))
    return evaluation.report.Material(args, AutoTokenizer.from_pretrained(tiny_llama))


def test_an_oracle_finds_all_numbers_and_one_with_a_window_those_in_it_alone(evaluation, tiny_llama):
    material = small_material(evaluation, tiny_llama)
    config = LlamaConfig(vocab_size=300)
    seeing = evaluation.report.find_needles(CopyingOracle(config), material, 6000, "oracle")
    assert torch.tensor(seeing["found"]).shape == (2, 40) and torch.tensor(seeing["found"]).all()
    assert max(map(max, seeing["log_probability"])) <= 0 and min(map(min, seeing["log_probability"])) > -1e-3
    depths = evaluation.written.by_depth(seeing, "found")
    assert len(depths) == 10 and all(cell and set(cell) == {1.0} for cell in depths)

    window = 3500
    blind = evaluation.report.find_needles(CopyingOracle(config, window), material, 6000, "blind")
    found, distance = torch.tensor(blind["found"]).bool(), torch.tensor(blind["distance"])
    assert found[distance < window - 20].all() and not found[distance > window + 20].any()
    assert 0 < found.double().mean() < 1
    chance = -len(str(10**6)) * math.log(300)  # knows nothing: all tokens alike
    assert torch.tensor(blind["log_probability"])[~found].amax() < chance / 3
    share = evaluation.written.share_in_window(blind, window)
    assert share == pytest.approx(found.double().mean().item(), abs=0.05)
    assert evaluation.written.share_in_window(blind, None) == 1


def test_numbers_are_asked_for_in_whole_and_stand_in_any_order(evaluation):
    """Of a tokenizer that cuts numbers unevenly, too."""
    tokens = Tokenizer(BPE())
    tokens.pre_tokenizer, tokens.decoder = ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    numbers = [f" {x}" for x in range(10**6, 10**7, 7919)]
    trainer = BpeTrainer(vocab_size=600, initial_alphabet=ByteLevel.alphabet(), show_progress=False)
    tokens.train_from_iterator(numbers, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokens)
    first_names = set()
    for ids, answers, said in evaluation.of.make_needles(torch.zeros(2, 6000).long(), tokenizer, 4, seed=0):
        text = tokenizer.decode(ids)
        assert len(ids) == 6000 and len(answers) == 40 and len(set(map(len, answers))) > 1
        for answer, place in zip(answers, said.tolist(), strict=True):
            asked = re.search(r"secret number of (\w+) is$", tokenizer.decode(ids[: answer[0]]))[1]
            number = tokenizer.decode(ids[answer])
            assert re.fullmatch(r" \d{7}", number)
            assert tokenizer.decode(ids[: place + 1]).endswith(f"The secret number of {asked} is{number}.\n")
        names = re.findall(r"secret number of (\w+) is \d+\.", text)
        assert sorted(names) == sorted(evaluation.of.NAMES) != names
        first_names.add(names[0])
    assert len(first_names) > 1


def test_the_window_of_equal_pairs_makes_room_for_its_sink(evaluation):
    for length, sink in itertools.product((64, 512, 4096), (0, 1, 4, 40)):
        for width in (1, 5, 48, length - 60, length):
            window = DilatedPattern((width,), (1,), ("window",))
            pairs = (window.with_branch("sink", sink) if sink else window).pairs(length, 1) / length
            if width <= length - sink:  # of a wider one, some of the sink is always in the window
                assert evaluation.of.window_of_pairs(pairs, length, sink) == width
        paper = DilatedPattern(**evaluation.of.papers_pattern(length))
        width = evaluation.of.window_of_equal_work(paper, length, sink)
        pattern = DilatedPattern((width,), (1,), ("window",))
        pairs = (pattern.with_branch("sink", sink) if sink else pattern).pairs(length, 1) / length
        assert width == 1 or abs(pairs - paper.pairs(length, 12) / 12 / length) <= 0.5


def test_texts_of_a_kind_are_those_of_all_its_entries(evaluation, tmp_path):
    for name in "abc":
        (tmp_path / f"{name}.txt").write_text(name)
    found = evaluation.of.read_documents([f"{kind}={tmp_path}/{name}.txt" for kind, name in ("xb", "yc", "xa")])
    assert {kind: list(texts) for kind, texts in found.items()} == {"x": ["b", "a"], "y": ["c"]}


def test_logits_of_models_in_bfloat16_have_no_ties(evaluation):
    config = LlamaConfig(
        vocab_size=5000, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    model = LlamaForCausalLM(config).eval().bfloat16()
    ids = torch.randint(5000, (200,), generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        states = model.model(input_ids=ids[None]).last_hidden_state[0, :-1]
    logits = states.float() @ model.lm_head.weight.detach().float().T
    losses, is_top = evaluation.of.token_losses(model, ids, 1, in_bf16=True)
    assert evaluation.of._head_is_all(model)
    torch.testing.assert_close(losses, F.cross_entropy(logits, ids[1:], reduction="none"), rtol=0, atol=1e-5)
    assert is_top.equal(logits.argmax(-1) == ids[1:])


def test_studies_say_nothing_of_what_they_have_not_measured(evaluation, tiny_llama, monkeypatch):
    """A class without tokens, a curve before its first point; and all rows of a step count."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    heads, scratch = importlib.import_module("pretrained_heads"), importlib.import_module("from_scratch")
    args = heads.Arguments(context_length=32)
    texts, distances = torch.randint(300, (1, 32)), [torch.zeros(32).long()]
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    losses = heads.measure(model, {"text": (texts, distances, [])}, args, "full")["text"]["losses"]
    assert losses["near"] == losses["far"] == [None] and losses["new"] == losses["all"] != [None]

    curve = [{"seconds": seconds, "loss": {"text": [loss]}} for seconds, loss in ((10, 4.0), (20, 2.0))]
    assert scratch.at_time(curve, 15, "text") == 3 and math.isnan(scratch.at_time(curve, 9, "text"))
    assert evaluation.written.said([math.nan]) == "–"

    step = SimpleNamespace(train_batch_size=2, gradient_accumulation_steps=3, world_size=4)
    assert importlib.import_module("training").rows_per_step(step) == 24


def solve_ruler(text):
    """The end of the text of a task, solved from what is seen of it, by rules of its own."""
    question = text[text.rfind("\n", 0, -1) :]
    seen = text.removesuffix(question)
    listed = "{}, {}, {}, and {}"
    if "special magic" in question:
        (keys,) = re.findall(r"special magic numbers? for (.*?) mentioned in the provided text\?", question)
        said = re.findall(r"One of the special magic numbers for (\S+) is: (\d{7})\.", seen)
        found = [value for key in re.findall(r"\w+-\w+", keys) for name, value in said if name == key]
        found += ["0000000"] * 4
        return " " + (listed.format(*found) if "numbers" in question else found[0])
    if "chain(s)" in question:
        (value,) = re.findall(r"assigned the value (\d+) in", question)
        names = {value: "?????"} | {to: name for name, to in re.findall(r"VAR (\w+) = (?:VAR )?(\w+)", seen)}
        chain = [value]
        for _ in range(5):
            chain.append(names.get(chain[-1], "?????"))
        return " " + " ".join(chain[1:])
    if "top 10" in question:
        words = re.findall(r"\d+\. (\S+)", seen[seen.rfind("most often.\n") :])
        counts = Counter(words).most_common(10)  # of equal ones, the first in the list
        most = [word for word in dict.fromkeys(words) if word in dict(counts)]
        return "".join(f" {i}. {word}" for i, word in enumerate(most, 1))
    words = Counter(re.findall(r"\b[a-z]{6}\b", seen[seen.rfind("frequently appeared coded words. ") + 33 :]))
    return " {}, {}, and {}".format(*(word for word, _ in (words + Counter(["?"] * 3)).most_common(3)))


class SolvingOracle(PreTrainedModel):
    """Goes on behind a question of RULER as its text says, of which it sees the last `window` characters."""

    config_class = LlamaConfig

    def __init__(self, config, tokenizer, start, window=None):
        super().__init__(config)
        self.tokenizer, self.start, self.window = tokenizer, start, window
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def get_output_embeddings(self):
        return None

    def forward(self, input_ids, use_cache=None):
        before = input_ids[0, : self.start]
        solved = solve_ruler(self.tokenizer.decode(before if self.window is None else before[-self.window :]))
        ids = torch.tensor(self.tokenizer(solved)["input_ids"])
        logits = torch.zeros(1, input_ids.shape[1], self.config.vocab_size)
        for t, token in zip(range(self.start - 1, input_ids.shape[1]), ids, strict=False):
            logits[0, t, token] = 30.0
        return CausalLMOutput(logits=logits)


def test_tasks_of_ruler_are_solved_from_their_texts_and_not_from_what_is_out_of_sight(evaluation, tiny_llama):
    material = small_material(evaluation, tiny_llama)
    tokenizer, window = material.tokenizer, 1600
    blind_to = 0
    for name in evaluation.ruler.TASKS:
        for ids, answers, chance in evaluation.ruler.make_tasks(name, tokenizer, 6000, material.texts, 4, seed=0):
            text, start = tokenizer.decode(ids), int(answers[0][0])
            if name == "common_words":
                start -= len(" 1.")
            assert 5900 < len(ids) <= 6000 and int(answers[-1][-1]) == len(ids) - 1 and 0 < chance < 0.3
            assert len(answers) == {"multi_key": 1, "variable_tracking": 5, "common_words": 10}.get(name, len(answers))
            for sight in (None, window):
                model = SolvingOracle(LlamaConfig(vocab_size=300), tokenizer, start, sight)
                _, is_top = evaluation.of.token_losses(model, ids, start)
                right = [bool(is_top[answer - start].all()) for answer in answers]
                if sight is None:
                    assert all(right), name
                elif "words" not in name:  # of words that are counted, a part of the list says nearly the same
                    said = [text.find(tokenizer.decode(ids[answer]).strip()) for answer in answers]
                    if name == "variable_tracking":  # a chain is lost with its beginning
                        said = [text.rfind(" = " + re.search(r"value (\d+) in", text[5000:])[1], 0, start - 300)] * 5
                    for is_right, place in zip(right, said, strict=True):
                        assert place > start - window or not is_right, name
                        blind_to += not is_right
    assert blind_to > 20


def test_tasks_of_ruler_differ_by_more_than_words(evaluation, tiny_llama):
    """Common words come in another order in each text; chance is to draw from what stands behind the example."""
    material = small_material(evaluation, tiny_llama)
    orders = set()
    for ids, _, _ in evaluation.ruler.make_tasks("common_words", material.tokenizer, 6000, material.texts, 3, seed=0):
        ranks: dict[str, int] = {}
        words = re.findall(r"\d+\. (\w+)", material.tokenizer.decode(ids))[:60]
        orders.add(tuple(ranks.setdefault(word, len(ranks)) for word in words))
    assert len(orders) == 3
    ((ids, answers, chance),) = evaluation.ruler.make_tasks(
        "variable_tracking", material.tokenizer, 6000, material.texts, 1, seed=0
    )
    text = material.tokenizer.decode(ids)
    behind_example = text[text.rfind("Memorize and track") :]
    assert 1 / chance == len(answers) == len(set(re.findall(r"VAR (\w+) =", behind_example)))


def test_a_report_asks_the_tasks_of_ruler(evaluation, tiny_llama, monkeypatch):
    """As the model is asked, and with the first token that it expects."""
    material = small_material(evaluation, tiny_llama, ruler_texts=3)
    material.first_token = 299
    made = {name: evaluation.ruler.make_tasks(name, material.tokenizer, 4000, material.texts[:, -4000:], 3, seed=0)
            for name in evaluation.ruler.TASKS}  # fmt: skip
    order = iter([task for tasks in made.values() for task in tasks])

    def all_but_the_last_answer(model, ids, start):
        task = next(order)
        assert ids[0] == 299 and ids[1:].equal(task.ids[1:]) and start == task.answers[0][0]
        is_top = torch.ones(len(ids) - start, dtype=torch.bool)
        is_top[-1] = False
        return torch.full((len(ids) - start,), 2.0), is_top

    monkeypatch.setattr(evaluation.of, "token_losses", all_but_the_last_answer)
    result = evaluation.report.answer_ruler(None, material, 4000, "oracle")
    shares = dict(multi_key=0, multi_value=3 / 4, multi_query=3 / 4, variable_tracking=4 / 5, common_words=9 / 10)
    for name, share in (shares | dict(frequent_words=2 / 3)).items():
        assert result[name]["right"] == pytest.approx([share] * 3)
    assert result["multi_key"]["log_probability"] == [-2.0 * len(" 1234567")] * 3
    written = evaluation.written.ruler_of({"model": {"pairs": None, "ruler-4000": result}}, [4000])
    assert "| multi_value | 4000 | 75.0% | 25.0% |" in "\n".join(written)


def test_tasks_of_ruler_that_do_not_fit_are_refused(evaluation, tiny_llama):
    material = small_material(evaluation, tiny_llama)
    for name in evaluation.ruler.TASKS:
        with pytest.raises(ValueError, match="must be longer for RULER's .*, got 300 tokens") as refused:
            evaluation.ruler.make_tasks(name, material.tokenizer, 300, material.texts, 1, seed=0)
        least = int(re.search(r"(\d+) are the least", str(refused.value))[1])
        with pytest.raises(ValueError, match=f": {least} are the least"):
            evaluation.ruler.make_tasks(name, material.tokenizer, least - 1, material.texts, 1, seed=0)
        (task,) = evaluation.ruler.make_tasks(name, material.tokenizer, least, material.texts, 1, seed=0)
        assert least - 100 < len(task.ids) <= least
    with pytest.raises(ValueError, match="`name` must be one of .*multi_key.*, got 'qa'"):
        evaluation.ruler.make_tasks("qa", material.tokenizer, 6000, material.texts, 1, seed=0)
    numbers = torch.tensor([material.tokenizer("0123456789" * 600)["input_ids"]])  # no words: they are made up
    for name in evaluation.ruler.TASKS:
        (task,) = evaluation.ruler.make_tasks(name, material.tokenizer, 6000, numbers, 1, seed=0)
        assert len(task.ids) > 5900


def test_tasks_of_ruler_are_no_longer_than_asked_if_words_are_tokens_with_what_is_around_them(evaluation):
    """Answers take more tokens than the same words in a list."""
    pair = "|".join(rf"{i}\. [a-z]+" for i in range(1, 11))

    class Tokenizer:
        def __call__(self, text, add_special_tokens=True):
            return {"input_ids": [len(token) for token in re.findall(rf" ?(?:{pair})|\S|\s", text)]}

        def decode(self, ids):
            return ""

    for name in evaluation.ruler.TASKS:
        (task,) = evaluation.ruler.make_tasks(name, Tokenizer(), 4000, torch.ones(1, 4000).long(), 1, seed=0)
        assert 3900 < len(task.ids) <= 4000, name


def test_perplexity_of_tokens_that_need_a_long_context(evaluation):
    short = torch.tensor([[5.0, 5.0, 1.0, 9.0], [4.0, 0.5, 4.5, 9.0], [1.0, 1.0, 1.0, 1.0]])
    long = torch.tensor([[1.0, 3.5, 0.1, 1.9], [0.5, 0.2, 2.0, 0.5], [0.5, 0.5, 0.5, 0.5]])
    keys = evaluation.of.key_tokens(short, long)
    assert keys.tolist() == [[True, False, False, True], [True, False, False, True], [False] * 4]
    arms = {
        name: {"pairs": pairs, "contexts": {"true": {"2": [], "8": []}}, "token_losses": {
            which: evaluation.of.pack(losses) for which, losses in of.items()}}
        for name, pairs, of in (
            ("model", 9.0, dict(short=long, long=long + 1)), ("full", 9.0, dict(short=short, long=long)),
        )
    }  # fmt: skip
    torch.testing.assert_close(evaluation.of.unpack(arms["full"]["token_losses"]["short"]), short.double())
    # ratio of sums: (2.9 + 1.0) / 4, from the two texts that have key tokens
    mean = math.exp(3.9 / 4)
    error = mean * math.sqrt(((2.9 - 1.95) ** 2 + (1.0 - 1.95) ** 2) * 2) / 4
    assert evaluation.of.long_perplexity(long, keys) == pytest.approx((mean, error))
    assert evaluation.of.long_perplexity(long[:1], keys[:1])[0] == pytest.approx(math.exp(1.45))
    assert all(map(math.isnan, evaluation.of.long_perplexity(long[2:], keys[2:])))
    said = "\n".join(evaluation.written.long_perplexity_of(arms))  # both by the key tokens of `full`
    assert "4 key tokens of 12" in said and "under `full`" in said
    assert f"| full | {mean:.3f} ± {error:.2f}" in said and f"| {1 / math.e:.3f} |" in said  # of the model's
    assert "the last 3 tokens more" in said and f"| model | {mean * math.e:.3f} ±" in said
    assert "Left out" in "\n".join(evaluation.written.long_perplexity_of({"model": arms["model"]}))
    arms["model"]["pairs"] = None
    same = {"model": arms["model"] | {"contexts": {"true": {"8": []}}}}
    assert "Left out: the short and the long context are the same 8" in evaluation.written.long_perplexity_of(same)[2]
    assert "under `model`" in "\n".join(evaluation.written.long_perplexity_of({"model": arms["model"]}))


def test_losses_of_tokens_are_those_of_the_models_own_logits(evaluation):
    shape = dict(
        vocab_size=50, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, initializer_range=0.5,
    )  # fmt: skip
    ids = torch.randint(50, (40,), generator=torch.Generator().manual_seed(0))
    for config, is_plain in (
        (LlamaConfig(**shape), True),
        (GemmaConfig(**shape), True),
        (Gemma2Config(**shape, final_logit_softcapping=2.0), False),
        (CohereConfig(**shape, logit_scale=0.5), False),
    ):
        model = AutoModelForCausalLM.from_config(config).eval()
        logits = model(ids[None]).logits[0].detach()
        losses, is_top = evaluation.of.token_losses(model, ids, 7)
        torch.testing.assert_close(losses, F.cross_entropy(logits[6:-1], ids[7:], reduction="none"))
        assert is_top.equal(logits[6:-1].argmax(-1) == ids[7:])
        assert evaluation.of._head_is_all(model) == is_plain, config.model_type


def test_copies_and_contexts_of_a_report_are_what_they_are_called(evaluation, tiny_llama):
    ids = torch.tensor([1, 2, 3, 4, 9, 1, 2, 3, 4, 1, 2, 3, 5, 1, 2, 3, 4])
    assert evaluation.of.copy_distance(ids).tolist() == [0] * 8 + [5] + [0] * 7 + [8]
    assert evaluation.of.copy_distance(ids, context=2).tolist()[7:] == [5, 5, 0, 0, 4, 0, 0, 0, 4, 8]
    material = small_material(evaluation, tiny_llama)
    classes = evaluation.report.copy_classes(torch.tensor([0, 1, 2047, 2048, 4095, 4096, 5999]), material)
    assert {name: is_in.nonzero().flatten().tolist() for name, is_in in classes.items()} == {
        "never": [0], "1-2047 back": [1, 2], "2048-4095 back": [3, 4], "4096-5999 back": [5, 6],
    }  # fmt: skip
    assert material.prefixes == [500, 1000, 2000, 4000, 5500]
    for index, text in enumerate(material.texts):
        true, shuffled, foreign = (material.with_context(kind, index, 1000) for kind in evaluation.report.CONTEXTS)
        assert true.equal(text[-1500:]) and shuffled[1000:].equal(true[1000:]) and foreign[1000:].equal(true[1000:])
        assert not shuffled.equal(true) and shuffled[:1000].sort().values.equal(true[:1000].sort().values)
        other = material.texts[material.foreign[index]]
        assert foreign[:1000].equal(other[-1000:]) and not other.equal(text)
    material.first_token = 7
    assert material.with_context("true", 0, 500)[0] == 7 and len(material.with_context("true", 0, 500)) == 1000


def test_baselines_have_full_attention_and_a_window_of_equal_pairs(evaluation, tiny_llama, tmp_path):
    pattern = dict(segment_lengths=[64, 512], dilation_rates=[1, 4], branch_types=["window"] * 2, sink_tokens=2)
    longnet = LongNetForCausalLM.from_llama(str(tiny_llama), **pattern, full_attention_heads={1: [0]})
    longnet.save_pretrained(tmp_path / "longnet")
    exchanged = set_dilated_attention(LlamaForCausalLM.from_pretrained(tiny_llama), **pattern)
    exchanged.save_pretrained(tmp_path / "exchanged")
    ids = torch.arange(60)[None]
    weights = LlamaForCausalLM.from_pretrained(tiny_llama, max_position_embeddings=4096).eval()
    for name in ("longnet", "exchanged"):
        args = evaluation.report.Arguments(model=str(tmp_path / name), lengths=[64], target_tokens=8, device="cpu")
        arms = {arm: evaluation.report.load_arm(arm, args) for arm in evaluation.report.ARMS}
        abouts = {arm: about for arm, (_, about) in arms.items()}
        assert abouts["full"]["pairs"] == 65 / 2 and abouts["full"]["dense_window"] is None
        torch.testing.assert_close(arms["full"][0](ids).logits, weights(ids).logits)
        args.lengths = [2048]
        pairs = describe(arms["model"][0], 2048).pairs_per_token
        assert evaluation.report.load_arm("window", args)[1]["pairs"] == pytest.approx(pairs, rel=0.05)
    about = evaluation.report.load_arm(
        "model", evaluation.report.Arguments(model=str(tmp_path / "longnet"), device="cpu")
    )[1]
    assert about["dense_window"] == 64  # of the heads that see least

    shape = dict(vocab_size=300, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2)
    shape |= dict(num_key_value_heads=1, head_dim=8)
    AutoModelForCausalLM.from_config(GemmaConfig(**shape)).save_pretrained(tmp_path / "gemma")
    AutoModelForCausalLM.from_config(Gemma2Config(**shape)).save_pretrained(tmp_path / "gemma2")
    args = evaluation.report.Arguments(model=str(tmp_path / "gemma"), lengths=[2048], target_tokens=8, device="cpu")
    assert evaluation.report.load_arm("model", args)[0].config.model_type == "gemma"
    assert evaluation.report.load_arm("window", args)[1]["dense_window"] < 200
    args.model = str(tmp_path / "gemma2")
    assert evaluation.report.load_arm("model", args)[1]["pairs"] is None
    with pytest.raises(evaluation.report.ArmMissing, match="sliding_attention|soft cap"):
        evaluation.report.load_arm("window", args)

    args = evaluation.report.Arguments(model=str(tiny_llama), lengths=[2048], target_tokens=8, device="cpu")
    with pytest.raises(evaluation.report.ArmMissing, match="its own attention"):
        evaluation.report.load_arm("full", args)
    model, about = evaluation.report.load_arm("window", args)
    assert about["stretched"] and model.config.rope_parameters["rope_type"] == "yarn"


def test_a_report_is_written_and_goes_on_where_it_was_stopped(tiny_llama, tmp_path):
    common = (
        *("--model", tiny_llama, "--data", ROOT / "longnet_hf", ROOT / "docs", "--lengths", 3600, 4096),
        *("--texts", 2, "--needle_texts", 3, "--ruler_texts", 1, "--device", "cpu", "--output_dir", "run"),
        *("--target_tokens", 1024),
    )
    done = run("evaluate.py", *common, folder=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    report, results = (tmp_path / "run" / "report.md").read_text(), (tmp_path / "run" / "report.json").read_text()
    plain = json.loads(results, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert "missing" in plain["full"] and "`full` is left out" in report and "YaRN" in report
    assert list(plain["model"]["contexts"]["true"]) == ["1024", "2048", "3072"]
    assert len(plain["model"]["needles-3600"]["found"]) == 3 and "whose haystacks repeat" in report
    for loss in plain["model"]["losses"]["position"].values():
        assert loss == pytest.approx([math.log(300)] * 2, rel=0.05)  # knows nothing, as chance
    assert f"a loss of {math.log(300):.2f} nats" in report and "nan" not in report
    assert "| positions | model | window | window - model |" in report
    for key, losses in plain["window"]["losses"]["position"].items():
        x, y = (loss - own for loss, own in zip(losses, plain["model"]["losses"]["position"][key], strict=True))
        (row,) = (line for line in report.splitlines() if line.startswith(f"| {key} |"))
        error = f" ± {abs(x - y) / 2:.3f}" if x != y else ""
        assert row.endswith(f"| {(x + y) / 2:+.3f}{error} |")  # text by text
    pictures = [name.partition(")")[0] for name in report.split("](")[1:]]
    assert len(pictures) == 5
    assert "| frequent_words | 4096 |" in report and "key tokens of 2048" in report
    assert set(plain["model"]["ruler-3600"]["multi_key"]["chance"]) == {0.25}
    losses = plain["model"]["token_losses"]["long"]
    assert [len(json.dumps(losses)) < 12_000, len(losses)] == [True, 2]
    assert all((tmp_path / "run" / picture).stat().st_size > 5_000 for picture in pictures)

    file = tmp_path / "run" / "report.json"
    del plain["window"]["needles-4096"]
    file.write_text(json.dumps(plain))
    done = run("evaluate.py", *common, folder=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("is measured already") == 1 and "window: numbers in 4096" in done.stderr
    assert "losses" not in done.stderr
    assert json.loads(file.read_text())["window"]["needles-4096"] == json.loads(results)["window"]["needles-4096"]

    # An arm that was stopped, and is not asked for, is not reported
    other = json.loads(results)
    other["window"] = {"missing": "for a reason of then"}
    file.write_text(json.dumps(other))
    done = run("evaluate.py", *common, "--arms", "model", folder=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "`window` is left out: for a reason of then" in (tmp_path / "run" / "report.md").read_text()
    del other["window"], other["model"]["needles-4096"]
    other["window"] = plain["window"]  # without its numbers in 4096
    file.write_text(json.dumps(other))
    done = run("evaluate.py", *common, "--arms", "model", folder=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "`window`" not in (tmp_path / "run" / "report.md").read_text()
    refused = run("evaluate.py", *common, "--seed", 1, folder=tmp_path)
    assert refused.returncode != 0 and "seed was 0, is 1" in refused.stderr


def test_differences_are_of_texts_that_both_have(evaluation):
    assert evaluation.written.above([1.5, None, 3.0, 2.0], [1.0, 1.0, None, 2.5]) == [0.5, None, None, -0.5]


def test_what_a_report_cannot_be_made_of_is_refused(evaluation, tiny_llama, tmp_path):
    (tmp_path / "one.txt").write_text("a line of a document\n")
    wrong = (
        (dict(arms=["full"]), "`--arms` must be `model` and others"),
        (dict(arms=["model", "dense"]), "'dense'"),
        (dict(texts=1), "`--texts` must be at least 2, got 1"),
        (dict(ruler_texts=-1), "`--ruler_texts` must be at least 0, got -1"),
        (dict(needle_texts=-1), "`--needle_texts` must be at least 0, got -1"),
        (dict(lengths=[0, 6000]), "`--lengths` must be of at least 2 tokens, got 0"),
        (dict(target_tokens=4000), "at most half of the longest of `--lengths`, 6000, got 4000"),
        (dict(texts=500), "fills [0-9]+ texts of 6000 tokens, and 500 are needed"),
        (dict(data=[str(tmp_path / "none.txt")]), "`--data` names no text file"),
        (dict(data=[str(tmp_path), str(tmp_path / "none.txt")]), "`--data`: no file or folder .*none.txt"),
    )
    for changes, words in wrong:
        with pytest.raises(ValueError, match=words):
            small_material(evaluation, tiny_llama, **changes)


def test_a_report_that_is_refused_is_asked_for_again_with_other_settings(
    evaluation, tiny_llama, monkeypatch, tmp_path
):
    """What does not fit is said before anything is measured, and is not taken for settings of a run."""

    def measure(arm, *_):
        raise InterruptedError(arm)

    monkeypatch.setattr(evaluation.report, "measure_arm", measure)
    for length, error, words in ((2500, ValueError, "40 numbers take"), (3500, InterruptedError, "model")):
        command = ("evaluate.py", "--model", tiny_llama, "--data", ROOT / "longnet_hf", ROOT / "docs", "--texts", 2)
        command += ("--lengths", length, 4096, "--ruler_texts", 1, "--output_dir", tmp_path / "run")
        monkeypatch.setattr(sys, "argv", list(map(str, command)))
        with pytest.raises(error, match=words):
            evaluation.report.main()
    monkeypatch.setattr(evaluation.report, "make_needles", lambda *_: None)
    with pytest.raises(ValueError, match="RULER's .*, got 700 tokens"):
        evaluation.report.check_shortest(small_material(evaluation, tiny_llama, lengths=[700, 6000], ruler_texts=1))
    evaluation.report.check_shortest(small_material(evaluation, tiny_llama, lengths=[700, 6000], ruler_texts=0))
    monkeypatch.undo()
    with pytest.raises(ValueError, match="`--needle_texts 0` leaves them out"):
        evaluation.report.check_shortest(small_material(evaluation, tiny_llama, lengths=[700, 6000], ruler_texts=0))


def test_a_report_of_short_texts_of_one_document_leaves_numbers_and_foreign_contexts_out(tiny_llama, tmp_path):
    command = (
        "--model",
        tiny_llama,
        "--data",
        ROOT / "longnet_hf" / "__init__.py",
        "--texts",
        2,
        "--lengths",
        256,
        512,
    )
    command += ("--target_tokens", 128, "--needle_texts", 0, "--ruler_texts", 0, "--arms", "model")
    done = run("evaluate.py", *command, "--output_dir", "run", folder=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    report = (tmp_path / "run" / "report.md").read_text()
    assert "## Loss by position" in report and "40 numbers" not in report and "Numbers found" not in report
    assert not (tmp_path / "run" / "needles.png").exists()
    assert "| context | arm | true | shuffled | shuffled - true |" in report
    assert "Foreign contexts are left out" in report and "foreign -" not in report


@pytest.fixture
def report_of_marks(evaluation, monkeypatch):
    """Makes reports whose arms are not measured but marked, by the weights they had; gives the arms of each."""

    def mark(arm, args, material, results, weights):
        marks = dict.fromkeys(evaluation.report.pieces_of(args), "measured")
        results.save(**{arm: {"weights": weights} | marks})

    def make(*arguments):
        monkeypatch.setattr(sys, "argv", list(map(str, ("evaluate.py", "--texts", 2, *arguments))))
        evaluation.report.main()
        return json.loads(Path(arguments[arguments.index("--output_dir") + 1], "report.json").read_text())

    monkeypatch.setattr(evaluation.report, "measure_arm", mark)
    monkeypatch.setattr(evaluation.report, "write_report", lambda *_: None)
    return make


SHORT = ("--lengths", 512, "--target_tokens", 128, "--needle_texts", 0, "--ruler_texts", 0, "--device", "cpu")


def test_a_report_does_not_go_on_with_other_texts_or_weights(report_of_marks, tiny_llama, tmp_path):
    model, data, run_folder = tmp_path / "model", tmp_path / "data", tmp_path / "run"
    shutil.copytree(tiny_llama, model)
    data.mkdir()
    for name in "ab":
        (data / f"{name}.txt").write_text(f"a line of {name}\n" * 50)
    command = ("--model", model, "--data", data, *SHORT, "--output_dir", run_folder)
    beside = ("--beside", f"other={model}")
    first = report_of_marks(*command, *beside)
    assert first["other"]["weights"] == first["model"]["weights"]
    assert report_of_marks(*command) == first
    LlamaForCausalLM.from_pretrained(model).save_pretrained(model)  # the same
    assert report_of_marks(*command, *beside) == first

    (data / "a.txt").write_text("a line of x\n" * 50)
    with pytest.raises(ValueError, match="texts_sha256 was .*another `--output_dir`"):
        report_of_marks(*command)
    (data / "a.txt").write_text("a line of a\n" * 50)
    assert report_of_marks(*command) == first
    changed = LlamaForCausalLM.from_pretrained(model)
    changed.model.norm.weight.data[0] += 1
    changed.save_pretrained(model)
    with pytest.raises(ValueError, match="`--model .*` has other weights.* when `model` .*another `--output_dir`"):
        report_of_marks(*command)
    with pytest.raises(ValueError, match="`--beside other=.*` has other weights.* when `other` "):
        report_of_marks(*command, *beside, "--model", tiny_llama, "--output_dir", shutil.copytree(
            run_folder, tmp_path / "copied", ignore=lambda *_: ["settings.json"]
        ))  # fmt: skip

    settings = run_folder / "settings.json"  # as of a report that was begun before texts were noted
    settings.write_text(json.dumps({k: v for k, v in json.loads(settings.read_text()).items() if k != "texts_sha256"}))
    with pytest.raises(ValueError, match="texts_sha256 was None.*another `--output_dir`"):
        report_of_marks(*command)


def test_arms_that_are_missing_are_known_before_any_is_measured_and_tried_again(
    evaluation, report_of_marks, tiny_llama, monkeypatch, tmp_path
):
    shape = dict(vocab_size=300, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2)
    gemma = Gemma2Config(**shape, num_key_value_heads=1, head_dim=8)
    AutoModelForCausalLM.from_config(gemma).save_pretrained(tmp_path / "gemma2")
    AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(tmp_path / "gemma2")
    command = ("--model", tmp_path / "gemma2", "--data", ROOT / "longnet_hf", *SHORT, "--arms", "model", "window")
    command += ("--output_dir", tmp_path / "run")
    with monkeypatch.context() as stopped:
        stopped.setattr(evaluation.report, "measure_arm", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            report_of_marks(*command)
    results = json.loads((tmp_path / "run" / "report.json").read_text())
    assert "missing" in results["window"] and "model" not in results
    assert report_of_marks(*command)["window"] == results["window"]
    with monkeypatch.context() as possible:
        possible.setattr(evaluation.report, "load_arm", lambda *_: None)
        assert report_of_marks(*command)["window"]["losses"] == "measured"

    # The paper's pattern, whose pairs the window has, has segments of a sixteenth
    command = ("--model", tiny_llama, "--data", ROOT / "longnet_hf", *SHORT, "--target_tokens", 2, "--lengths")
    with pytest.raises(ValueError, match="`--lengths` must reach 16 tokens for the `window` of `--arms`.* got 12"):
        report_of_marks(*command, 12, "--output_dir", tmp_path / "short")
    assert "model" not in json.loads((tmp_path / "short" / "report.json").read_text())
    assert report_of_marks(*command, 16, "--output_dir", tmp_path / "longer")["window"]["losses"] == "measured"


def test_the_first_text_does_not_count_in_the_speed(evaluation, tiny_llama, monkeypatch):
    material = small_material(evaluation, tiny_llama)
    times = iter([0, 100, 200, 202, 300, 304])  # 100, 2 and 4 seconds
    monkeypatch.setattr(evaluation.report, "time", SimpleNamespace(perf_counter=lambda: next(times)))
    zeros = torch.zeros(5999)
    monkeypatch.setattr(evaluation.report, "token_losses", lambda *_: (zeros, zeros.bool()))
    assert evaluation.report.loss_of_texts(None, material, "model")["losses"]["tokens_per_second"] == 2000


def test_a_report_has_paired_differences_and_no_error_where_all_is_equal(evaluation):
    written = evaluation.written
    assert written.said([0.0, 0.0], "{:.1%}") == "0.0%" and written.said([0.1] * 3) == "0.100"
    assert written.signed([0.1, 0.3], "{:+.0%}") == "+20% ± 10%"

    needles = dict(depth=[[0.1, 0.9]] * 2, distance=[[9, 1]] * 2, log_probability=[[-1.0, -3.0], [-2.0, -4.0]])
    arms = {
        "model": {
            "contexts": {"true": {"8": [1.0, 2.0]}, "shuffled": {"8": [1.5, 2.0]}, "foreign": {"8": [2.0, 2.0]}},
            "needles-9": needles | {"found": [[1, 1], [1, 0]]},
            "ruler-9": {"multi_key": {"right": [1.0, 0.0], "chance": [0.25] * 2}},
        },
        "window": {
            "contexts": {"true": {"8": [1.0, 2.0]}, "shuffled": {"8": [1.0, 2.0]}, "foreign": {"8": [1.0, 2.0]}},
            "needles-9": needles | {"found": [[1, 0], [0, 0]]},
            "ruler-9": {"multi_key": {"right": [0.0, 0.0], "chance": [0.25] * 2}},
        },
    }  # fmt: skip
    for arm in arms.values():
        arm |= {"dense_window": None}
    contexts = written.contexts_of(arms).splitlines()
    assert contexts[0].endswith("| shuffled - true | use: foreign - true | use - model's |")
    assert contexts[2].endswith("| +0.250 ± 0.250 | +0.500 ± 0.500 |  |")
    assert contexts[3].endswith("| +0.000 | +0.000 | -0.500 ± 0.500 |")
    found = "\n".join(written.needles_of(arms, [9]))
    assert "| 9 | model | 75.0% ± 25.0% |  | -2.5 ± 0.5 |  | 100% |" in found
    assert "| 9 | window | 25.0% ± 25.0% | -50.0% | -2.5 ± 0.5 | +0.0 | 100% |" in found
    ruler = "\n".join(written.ruler_of(arms, [9]))
    assert "| multi_key | 9 | 50.0% ± 50.0% | 0.0% | 25.0% | -50.0% ± 50.0% |" in ruler
    alone = {"model": arms["model"]}
    assert written.contexts_of(alone).splitlines()[0].endswith("| use: foreign - true |")
    assert "- model" not in "\n".join(written.needles_of(alone, [9]) + written.ruler_of(alone, [9]))

    about = dict(hardware="a CPU", torch="2", transformers="5", longnet_hf="1")
    assert written.environment_of({"model": about, "full": about}) == "a CPU, torch 2, transformers 5, longnet-hf 1."
    both = written.environment_of({"model": about, "full": about | {"hardware": "a GPU"}})
    assert both.startswith("`model`: a CPU, torch") and "`full`: a GPU, torch" in both


def test_models_are_reported_beside_each_other(evaluation, tiny_llama, tmp_path):
    source = AutoModelForCausalLM.from_pretrained(tiny_llama).config
    config = LongNetConfig.from_llama(source, segment_lengths=[64, 512], dilation_rates=[1, 4])
    LongNetForCausalLM(config).save_pretrained(tmp_path / "longnet")
    AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(tmp_path / "longnet")
    command = ("--model", tiny_llama, "--data", ROOT / "longnet_hf", "--texts", 2, "--lengths", 256, 4096)
    command += ("--target_tokens", 128, "--needle_texts", 0, "--ruler_texts", 0, "--arms", "model")
    done = run("evaluate.py", *command, "--beside", "again=longnet", "--output_dir", "run", folder=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    report = (tmp_path / "run" / "report.md").read_text()
    assert "- `again`: longnet as it is" in report and "| positions | model | again | again - model |" in report
    assert "positions of `model`, `again` are stretched" in report
    alone = json.loads((tmp_path / "run" / "report.json").read_text())["again"]["losses"]["position"]
    done = run("evaluate.py", *command, "--model", "longnet", "--output_dir", "alone", folder=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads((tmp_path / "alone" / "report.json").read_text())["model"]["losses"]["position"] == alone

    # One is added to a report that is there; its name stays its own
    done = run("evaluate.py", *command, "--beside", "more=longnet", "--output_dir", "run", folder=tmp_path)
    assert done.returncode == 0 and done.stdout.count("is measured already") == 1, done.stderr[-2000:]
    done = run("evaluate.py", *command, "--beside", f"more={tiny_llama}", "--output_dir", "run", folder=tmp_path)
    assert "in run more is longnet; give another name or `--output_dir`" in done.stderr


def test_models_of_a_package_that_registers_them_are_reported(evaluation, tiny_llama, tmp_path, monkeypatch):
    (tmp_path / "strangers.py").write_text("""
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

class StrangeConfig(LlamaConfig):
    model_type = "strange"

class StrangeForCausalLM(LlamaForCausalLM):
    config_class = StrangeConfig

AutoConfig.register("strange", StrangeConfig)
AutoModelForCausalLM.register(StrangeConfig, StrangeForCausalLM)
""")
    AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(tmp_path / "model")
    AutoModelForCausalLM.from_pretrained(tiny_llama).save_pretrained(tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps(config | {"model_type": "strange"}))
    command = ("evaluate.py", "--model", tiny_llama, "--data", ROOT / "longnet_hf", "--texts", 2, "--lengths", 512)
    command += ("--target_tokens", 128, "--needle_texts", 0, "--ruler_texts", 0, "--arms", "model", "--device", "cpu")
    command += ("--beside", f"strange={tmp_path}/model", "--imports", "strangers", "--output_dir", tmp_path / "run")
    monkeypatch.setattr(sys, "argv", list(map(str, command)))
    with pytest.raises(ValueError, match="`--imports` must name packages that are installed, got 'strangers'"):
        evaluation.report.main()
    monkeypatch.syspath_prepend(tmp_path)
    evaluation.report.main()
    results = json.loads((tmp_path / "run" / "report.json").read_text())
    assert results["strange"]["losses"]["position"] == results["model"]["losses"]["position"]


def test_models_that_cannot_stand_beside_a_model_are_refused_before_anything_is_measured(
    evaluation, tiny_llama, tmp_path
):
    arguments = functools.partial(evaluation.report.Arguments, model=str(tiny_llama), lengths=[4096])
    for wrong in (["longnet"], ["full=x"], ["settings=x"], ["a=x", "a=y"], ["a="], ["a b=x"]):
        with pytest.raises(ValueError, match="`--beside` takes NAME=MODEL"):
            arguments(beside=wrong)
    assert arguments(beside=["a=x=y"]).others == {"a": "x=y"}
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)

    def check(model: Path):
        evaluation.report.check_others(arguments(beside=[f"other={model}"]), tokenizer, {})

    with pytest.raises(ValueError, match="`--beside other=.*nowhere` must be a model with its tokenizer"):
        check(tmp_path / "nowhere")
    AutoModelForCausalLM.from_pretrained(tiny_llama).save_pretrained(tmp_path / "alone")
    with pytest.raises(
        ValueError, match="^`--model me` must be a model with its tokenizer, which could not be loaded"
    ):
        evaluation.report.load_tokenizer(str(tmp_path / "alone"), "`--model me`")
    other = tmp_path / "other"
    padded = AutoTokenizer.from_pretrained(tiny_llama)
    padded.add_special_tokens({"pad_token": "<another>"})
    padded.save_pretrained(other)
    AutoModelForCausalLM.from_pretrained(tiny_llama).save_pretrained(other)
    check(other)
    GPT2Config(n_positions=128).save_pretrained(other)
    with pytest.raises(ValueError, match="at most 128 for `--beside other=.*, whose positions cannot be stretched"):
        check(other)
    begins = AutoTokenizer.from_pretrained(tiny_llama)
    begins._tokenizer.post_processor = TemplateProcessing(single="<end> $A", special_tokens=[("<end>", 0)])
    begins.save_pretrained(other)
    with pytest.raises(ValueError, match=r"with the same tokens around a text: of 'a' it makes \[0, .*\], not \["):
        check(other)
    tokens = Tokenizer(BPE())
    tokens.train_from_iterator(["another"], BpeTrainer(show_progress=False))
    PreTrainedTokenizerFast(tokenizer_object=tokens).save_pretrained(other)
    with pytest.raises(ValueError, match="`--beside other=.*other` must be a model of the tokenizer of"):
        check(other)


@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_a_record_is_of_the_gpu_that_was_used(evaluation, device, monkeypatch):
    record, gpu = importlib.import_module("record"), torch.device(device)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: f"the GPU {device}")
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device=None: 2**30 if device == gpu else 0)
    assert record.environment(device)["hardware"] == f"the GPU {device}"
    assert record.peak_gibibytes(device) == 1.0


def test_maps_of_attention_show_that_of_the_dense_formula(evaluation, tmp_path):
    maps = importlib.import_module("attention_map")
    shape = dict(vocab_size=50, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2)
    pattern = dict(segment_lengths=[16, 64], dilation_rates=[1, 2], segment_shift=True)
    longnet = LongNetForCausalLM(LongNetConfig(**shape, **pattern, initializer_range=0.5)).eval()
    longnet.save_pretrained(tmp_path / "longnet")
    llama = LlamaForCausalLM(LlamaConfig(**shape, initializer_range=0.5)).eval()
    llama.save_pretrained(tmp_path / "llama")
    ids, rows = torch.randint(50, (100,), generator=torch.Generator().manual_seed(0)), [99, 40, 0]
    for name, model in (("longnet", longnet), ("llama", llama)):
        model.set_attn_implementation("eager")
        expected = torch.stack(model(ids[None], output_attentions=True).attentions)[:, 0, :, rows]
        weights = maps.attention_of_rows(maps.load_model(str(tmp_path / name), 100, "cpu"), ids, rows)
        torch.testing.assert_close(weights, expected, rtol=0, atol=1e-5)
        for i, row in enumerate(rows):
            strips = weights[:, :, i].flatten(0, 1)
            figure = maps.draw(strips, row, ["0.0", "0.1", "1.0", "1.1"], "a title")
            position, distance = (torch.tensor(axes.images[0].get_array().data) for axes in figure.axes[:2])
            torch.testing.assert_close(position, strips[:, : row + 1])  # of a short text every token has its column
            bounds = sorted({0, *(b for b in (1, 2, 4, 8, 16, 32, 64) if b <= row), row + 1})
            parts = [strips[:, row - b + 1 : row - a + 1].sum(1) for a, b in zip(bounds, bounds[1:], strict=False)]
            torch.testing.assert_close(distance, torch.stack(parts, dim=1))


def test_the_passage_that_is_attended_to_is_found(evaluation, tiny_llama):
    """A head made by hand, whose "?" looks for "!", which stands in one place."""
    maps = importlib.import_module("attention_map")
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    text = "no <mark> here. " * 20 + "here it is: ! & nowhere else. " + "no mark here. " * 20 + "?"
    ids, pieces = maps.pieces_of(text, tokenizer, None)
    assert "".join(pieces) == text
    config = LongNetConfig(
        vocab_size=300, hidden_size=64, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
        use_rope=False, use_sub_norm=False, scale_embedding=False, segment_lengths=[None], dilation_rates=[1],
        branch_types=["window"], initializer_range=0.5,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LongNetForCausalLM(config).eval()
    question, answer = (int(ids[text.index(mark)]) for mark in "?!")
    with torch.no_grad():
        for projection in (model.model.layers[0].self_attn.q_proj, model.model.layers[0].self_attn.k_proj):
            projection.bias.zero_(), projection.weight.copy_(torch.eye(64))
        asks, is_asked = F.layer_norm(model.model.embed_tokens.weight[[question, answer]], (64,)) / 8
        model.model.layers[0].self_attn.q_proj.weight.copy_(torch.outer(is_asked, asks) * 4)
    row = len(ids) - 1
    weights = maps.attention_of_rows(model, ids, [row])[0, 0, 0]
    (weight, passage), *others = maps.passages_of(weights)
    assert weight > 0.9 and "it is: ! & no" in "".join(pieces[passage.start : passage.stop])
    assert sum(of_other for of_other, _ in others) < 0.1 and all(x.stop - x.start == 16 for _, x in others)
    page = maps.coloured(pieces, weights, row, "<title>")
    assert "&lt;title&gt;" in page and page.count("<span") == len(ids) and "<mark>" not in page and ">&amp;<" in page
    assert f'rgba(255,140,0,1.00)" title="token {text.index("!")}:' in page
    assert maps.quoted("<b>\n*x*") == "&lt;b&gt;⏎&#42;x&#42;"


def test_names_of_tokens_are_no_formulas(evaluation):
    maps = importlib.import_module("attention_map")
    for token in ("$$", "$\\frac$", "\n", "<b>"):
        figure = maps.draw(torch.rand(2, 20), 10, ["0.0", "0.1"], f"attention of token 10, {token!r}")
        figure.savefig(io.BytesIO())
        assert figure.axes[0].get_title() == f"attention of token 10, {token!r}"


def test_maps_of_attention_are_written_and_refused(evaluation, tiny_llama, tmp_path):
    (tmp_path / "text.txt").write_text("Σ of a text.\n" * 9)
    common = ("--model", tiny_llama, "--text", "text.txt", "--device", "cpu", "--output_dir", "run")
    done = run("attention_map.py", *common, "--rows", -1, 20, "--layers", 1, -1, "--heads", 0, folder=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names == {"row_125.png", "row_20.png", "row_125.html", "row_20.html", "passages.md"}
    assert "2 heads (of layers [1, 4])" in (tmp_path / "run" / "passages.md").read_text()
    (tmp_path / "empty.txt").write_text("")
    refused = run("attention_map.py", *common, "--text", "empty.txt", folder=tmp_path)
    assert "`--text` must be a file with text, got empty.txt, which is empty" in refused.stderr
    maps = importlib.import_module("attention_map")
    for name, given in (("rows", [126]), ("layers", [-6]), ("heads", [])):
        with pytest.raises(ValueError, match=f"`--{name}` must be indices from -5 to 4, got"):
            maps.chosen(name, given, 5)
    set_dilated_attention(
        LlamaForCausalLM.from_pretrained(tiny_llama), segment_lengths=[16], dilation_rates=[1]
    ).save_pretrained(tmp_path / "exchanged")
    shape = dict(vocab_size=300, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2)
    AutoModelForCausalLM.from_config(GemmaConfig(**shape)).save_pretrained(tmp_path / "gemma")
    for name, words in (("exchanged", "of which maps cannot be had"), ("gemma", "from_llama` takes: .*gemma")):
        with pytest.raises(ValueError, match=f"(?s)`--model` .*{words}"):
            maps.load_model(str(tmp_path / name), 100, "cpu")


@pytest.fixture
def recall(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "examples"), monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("associative_recall")


def test_rows_of_associative_recall_ask_for_the_value_of_each_key_once(recall):
    args = recall.Arguments(length=40, vocab_size=24, pairs=[3, 9])
    parities = set()
    for pairs in args.pairs:
        rows = recall.make_rows(args, pairs, 50, seed=1)
        for ids, labels, distance in zip(*(rows[name].tolist() for name in rows), strict=True):
            lead = next(t for t, token in enumerate(ids) if token)
            stop = lead + 2 * pairs
            known = dict(zip(ids[lead:stop:2], ids[lead + 1 : stop : 2], strict=True))
            assert len(known) == len(set(known.values())) == pairs
            assert all(1 <= key < 12 <= value < 24 for key, value in known.items())
            asked = [t - 1 for t, label in enumerate(labels) if label != -100]
            assert sorted(ids[t] for t in asked) == sorted(known) and min(asked) >= stop and lead < 5
            assert all(labels[t + 1] == known[ids[t]] and ids[t - distance[t + 1]] == ids[t] for t in asked)
            assert not any(ids[t] for t in range(stop, 40) if t not in asked)
            parities.add((lead % 2, asked[0] % 2))
    assert len(parities) == 4
    again = recall.make_rows(args, 9, 50, seed=1)["input_ids"]
    assert again.equal(rows["input_ids"]) and not again.equal(recall.make_rows(args, 9, 50, seed=2)["input_ids"])


def test_models_of_associative_recall_start_near_what_they_have_to_learn(recall):
    args = recall.Arguments(pairs=[8])
    model = recall.make_model("full", args).eval()
    model.set_attn_implementation("eager")
    ids = recall.make_rows(args, 8, 4, seed=0)["input_ids"]
    first, _ = model(ids, output_attentions=True).attentions
    favourite = first.argmax(-1)[:, :, 1:]  # of every query but the first
    assert favourite.equal(torch.arange(63).expand_as(favourite))
    attention = model.model.layers[1].self_attn
    torch.testing.assert_close(attention.o_proj.weight @ attention.v_proj.weight, torch.eye(64))
    assert attention.q_proj.weight.equal(attention.k_proj.weight)
    start = recall.make_model("full", recall.Arguments(start="random")).model.layers[0].self_attn
    assert not start.q_proj.bias.any() and not start.q_proj.weight.equal(start.k_proj.weight)


def test_accuracy_of_recall_is_split_by_the_dense_window(recall):
    """A model that knows the answers to all questions that stand near their keys."""
    args = recall.Arguments(pairs=[4, 16], test_rows=60)
    rows = [recall.make_rows(args, pairs, 60, seed=5) for pairs in args.pairs]
    near, calls = (
        20,
        iter([part for x in rows for part in zip(x["labels"].split(50), x["distance"].split(50), strict=True)]),
    )

    class Knowing(PreTrainedModel):
        config_class = LlamaConfig
        device = torch.device("cpu")

        def forward(self, ids):
            labels, distance = next(calls)
            knows = (labels != -100) & (distance < near)
            logits = F.one_hot(torch.where(knows, labels, 0), 64).double()
            return SimpleNamespace(logits=logits.roll(-1, 1))

    result = recall.measure(Knowing(LlamaConfig()), args, near, seed=5)
    assert result["inside"] == 1 and result["beyond"] == 0
    for pairs, of_pairs in zip(args.pairs, rows, strict=True):
        asked = of_pairs["labels"] != -100
        assert result["pairs"][pairs] == pytest.approx((of_pairs["distance"][asked] < near).double().mean().item())
    args.pairs = []
    with pytest.raises(ValueError, match="`--pairs` must lie between 1 and 16"):
        args.__post_init__()
    for wrong, words in ((dict(pairs=[17]), "between 1 and 16, a quarter of `--length`"), (dict(start="far"), "'far'"),
                         (dict(arms=["dense"]), "'dense'")):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            recall.Arguments(**wrong)


def test_associative_recall_goes_on_with_what_is_not_done(tmp_path):
    common = (
        *("--arms", "window-heads", "shifted", "--max_steps", 2, "--rows", 60, "--test_rows", 9, "--hidden_size", 16),
        *("--use_cpu", "--disable_tqdm", "true", "--output_dir", "run"),
    )
    done = run("associative_recall.py", *common, "--seeds", 0, of="benchmarks", folder=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names == {"settings.json", "window-heads-0.json", "shifted-0.json"}
    one = json.loads((tmp_path / "run" / "shifted-0.json").read_text())
    assert one["dense_window"] == 8 and set(one["pairs"]) == {"4", "8", "16"} and 0 <= one["beyond"] <= 1
    done = run("associative_recall.py", *common, "--seeds", 0, 1, of="benchmarks", folder=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("is done already") == 2
    assert re.search(r"\| `shifted`: the same, shifted in the second layer \| 2 \| 10 \| 8 \|", done.stdout)


def test_models_are_trained_from_scratch_and_training_goes_on_where_it_was_stopped(tiny_llama, tmp_path):
    data = f"code={ROOT / 'longnet_hf' / 'dilated_*.py'}", f"docs={ROOT / 'docs' / '*.md'}"
    common = (
        *("--tokenizer", tiny_llama, "--data", *data, "--context_length", 512, "--held_out", 2, "--hidden_size", 16),
        *("--head_dim", 4, "--num_hidden_layers", 2, "--max_steps", 5, "--eval_steps", 2, "--save_steps", 2),
        *("--save_total_limit", 99, "--output_dir", "run", "--use_cpu", "--disable_tqdm", "true"),
    )
    train = functools.partial(run, "from_scratch.py", *common, of="benchmarks", folder=tmp_path)
    done = train("--arms", "paper", "window-heads")
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads((tmp_path / "run" / "paper" / "result.json").read_text())
    assert [(point["step"], point["tokens"]) for point in result["curve"]] == [(2, 1024), (4, 2048), (5, 2560)]
    assert set(result["curve"][0]["loss"]) == {"code", "docs"} and (tmp_path / "run" / "curves.png").exists()

    # as if it had been stopped after its third step
    folder = tmp_path / "run" / "paper"
    shutil.rmtree(folder / "checkpoint-4"), shutil.rmtree(folder / "checkpoint-5")
    (folder / "result.json").write_text(json.dumps({"curve": result["curve"][:2]}))
    done = train("--arms", "paper", "window-heads", "full")
    assert done.returncode == 0, done.stderr[-2000:]
    assert "Going on from run/paper/checkpoint-2" in done.stdout and "window-heads is done already." in done.stdout
    again = json.loads((folder / "result.json").read_text())
    for ours, theirs in zip(again["curve"], result["curve"], strict=True):
        assert ours["step"] == theirs["step"] and ours["loss"].keys() == theirs["loss"].keys()
        for kind, losses in theirs["loss"].items():
            assert ours["loss"][kind] == pytest.approx(losses, abs=1e-4)
    times = [point["seconds"] for point in again["curve"]]
    assert times == sorted(times)
    assert done.stdout.count("| `") == 3 + 2 and "after 2560 tokens" in done.stdout
    assert "above `paper` on the same contexts" in done.stdout

    # or after its last, before that was measured
    (folder / "result.json").write_text(json.dumps({"curve": again["curve"][:2]}))
    done = train("--arms", "paper")
    assert done.returncode == 0, done.stderr[-2000:]
    last = json.loads((folder / "result.json").read_text())["curve"]
    assert [point["step"] for point in last] == [2, 4, 5] and last[2]["seconds"] >= last[1]["seconds"] > 0
    for kind, losses in again["curve"][2]["loss"].items():
        assert last[2]["loss"][kind] == pytest.approx(losses, abs=1e-4)

    learned = ("--vocab_size", 300, "--output_dir", "learned", "--max_steps", 1)
    for words in ("full", ""), ("full", "full is done already."):
        done = train("--arms", words[0], *learned)
        assert done.returncode == 0 and words[1] in done.stdout, done.stderr[-2000:]
    ids = load_file(tmp_path / "learned" / "contexts.safetensors")["docs"][0]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "learned" / "full")
    begins = (ROOT / "docs" / "architecture.md").read_text()[:99]
    assert len(tokenizer) == 300 and tokenizer.decode(ids).startswith(begins)

    done = train("--arms", "full", *learned, "--vocab_size", 100, "--output_dir", "small")
    assert re.search(r"`--vocab_size` must be at least \d+ here, got 100", done.stderr)

    done = train("--arms", "full", "--save_steps", 3)
    assert "`--save_steps` must be 2, as `--eval_steps` is" in done.stderr

    done = train("--arms", "windows", "--start_from", folder, "--output_dir", "on", "--learning_rate", 0)
    assert done.returncode == 0, done.stderr[-2000:]
    start, end = (load_file(x / "model.safetensors") for x in (folder, tmp_path / "on" / "windows"))
    assert all(torch.equal(start[name], end[name]) for name in start)
    for wrong, message in (
        (("--start_from", folder / "nowhere"), "`--start_from` must be the folder of a trained arm"),
        (("--start_from", folder, "--num_hidden_layers", 3), "num_hidden_layers is 2 in .*config.json, and 3 here"),
        (("--arms", "paper", "windows-64"), "`windows-64`, which needs a GPU to be trained, got cpu"),
    ):
        done = train("--arms", "windows", *wrong, "--output_dir", "wrong")
        assert re.search(message, done.stderr) and not (tmp_path / "wrong" / "contexts.safetensors").exists()


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_windows_of_blocks_are_those_of_the_pattern_where_blocks_have_one_key(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "examples"), monkeypatch.syspath_prepend(ROOT / "benchmarks")
    study = importlib.import_module("from_scratch")
    windows = dict(branch_types=["window"] * 3, head_offset="rotating", layer_idx=1)
    pattern = DilatedPattern([9, 37, 150], [1, 4, 16], **windows).with_branch("sink", 4)
    query, key, value = torch.randn(3, 2, 6, 150, 8)
    attend = functools.partial(study.attend_to_blocks, SimpleNamespace(pattern=pattern), query, key, value, None, 0.3)
    expected = dilated_attention_reference(query, key, value, pattern, scale=0.3).transpose(1, 2)
    torch.testing.assert_close(attend(block=1, attend=flex_attention)[0], expected, rtol=0, atol=1e-5)
    count = study.windows_of_blocks(pattern, 6, 8, 4, query.device)
    n, m = torch.arange(150)[:, None], torch.arange(150)
    for head in range(6):  # of the widest branch, behind the others
        far = count(n, m, torch.tensor(head))[140, 4:100] > 0
        assert far.tolist() == [x // 8 % 16 == pattern.phase(pattern.branches[2], head, 6) for x in range(4, 100)]


@pytest.mark.skipif(find_spec("fla") is not None, reason="flash-linear-attention is installed")
def test_an_arm_that_cannot_be_trained_is_refused_before_the_others_are(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(ROOT / "examples"), monkeypatch.syspath_prepend(ROOT / "benchmarks")
    study = importlib.import_module("from_scratch")
    assert set(study.Arguments().arms) == {"paper", "shifted", "window", "window-heads", "full"}
    for arm in ("deltanet", "gated-deltanet"):
        with pytest.raises(ValueError, match=f"`{arm}`, which needs `pip install flash-linear-attention`, got"):
            study.Arguments(arms=["paper", arm])
    monkeypatch.setattr(study, "find_spec", lambda name: None if name == "tilelang" else name)
    with monkeypatch.context() as hopper:
        hopper.setattr(torch.cuda, "is_available", lambda: True)
        hopper.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
        hopper.setattr(study, "version", lambda name: "3.6.0")
        with pytest.raises(ValueError, match="needs Triton 3.7.1 or tilelang on a Hopper GPU.*3.6.0, got"):
            study.Arguments(arms=["gated-deltanet"])
        assert study.Arguments(arms=["full", "deltanet"]).arms == ["full", "deltanet"]
        hopper.setattr(study, "version", lambda name: "3.7.1")
        assert study.Arguments(arms=["gated-deltanet"]).arms == ["gated-deltanet"]
    command = ("from_scratch.py", "--arms", "paper", "deltanet", "--use_cpu", "--output_dir", tmp_path)
    monkeypatch.setattr(sys, "argv", list(map(str, command)))
    with pytest.raises(ValueError, match="`deltanet`, which needs a GPU to be trained, got cpu"):
        study.main()


def test_a_pretrained_model_is_converted_by_its_heads(tiny_llama, tmp_path):
    common = ("--model", tiny_llama, "--context_length", 512, "--output_dir", "run")
    done = run("pretrained.py", *common, folder=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "key/value heads" in done.stdout and done.stdout.count("nats per token") == 3
    assert (tmp_path / "run" / "ranking.png").exists()
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert sum(map(len, config["full_attention_heads"].values())) == 2  # of ten
    done = run("lora.py", *common, "--max_steps", 2, "--use_cpu", "--report_to", "none", folder=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "after 2 steps" in done.stdout and (tmp_path / "run" / "adapter" / "adapter_model.safetensors").exists()

    # What is done is not done again, nor one step more; and other settings are not ignored
    common += ("--use_cpu", "--report_to", "none", "--max_steps", 2)
    again = run("lora.py", *common, folder=tmp_path)
    assert again.returncode == 0, again.stderr[-2000:]
    assert again.stdout.splitlines()[-1] == done.stdout.splitlines()[-1]
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-2"]
    refused = run("lora.py", *common, "--share", 0.5, folder=tmp_path)
    assert refused.returncode > 0 and "share was 0.2, is 0.5" in refused.stderr


@pytest.mark.parametrize("example", ["pretrained", "lora"])
def test_a_conversion_that_must_fail_is_refused_at_once(evaluation, example):
    arguments = importlib.import_module(example).Arguments
    wrong = [dict(context_length=0), dict(context_length=255), dict(share=0.0), dict(share=1.5), dict(share=-1.0)]
    for fields in wrong + [dict(window=0), dict(window=-5)] * (example == "pretrained"):
        ((name, value),) = fields.items()
        with pytest.raises(ValueError, match=rf"`--{name}` must .*, got {value}\."):
            arguments(**fields)
    arguments(context_length=256, share=1.0)


def test_windows_for_a_pretrained_model_come_with_a_sink(evaluation, tiny_llama, tmp_path, monkeypatch):
    example, converted = importlib.import_module("lora_on_the_prompt"), []
    monkeypatch.setattr(example, "get_peft_model", lambda model, adapters: converted.append(model) or sys.exit())
    options = ("--model", tiny_llama, "--entries", 1, "--use_cpu", "--output_dir", tmp_path / "run")
    monkeypatch.setattr(sys, "argv", ["lora_on_the_prompt.py", *map(str, options)])
    with pytest.raises(SystemExit):
        example.main()
    assert converted[0].config.sink_tokens == 4


def test_a_document_is_learned_and_asked_for(tiny_llama, tmp_path):
    common = ("--model", tiny_llama, "--passes", 2, "--use_cpu", "--report_to", "none", "--disable_tqdm", "true")
    numbers = (*common, "--entries", 4, "--save_steps", 2, "--save_total_limit", 99, "--output_dir", "run")
    done = run("lora_on_the_prompt.py", *numbers, folder=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    record = json.loads((tmp_path / "run" / "record.json").read_text())
    assert len(record["recall"]) == 4 and all(0 <= share <= 1 for share in record["recall"].values())
    assert len(record["continuations"]) == 4

    # as if it had been stopped after its second step
    file = tmp_path / "run" / "adapter" / "adapter_model.safetensors"
    adapter = load_file(file)
    (tmp_path / "run" / "result.json").unlink(), file.unlink()
    checkpoints = {path.name: path for path in (tmp_path / "run").glob("checkpoint-*")}
    assert len(checkpoints) > 1
    for name, path in checkpoints.items():
        if name != "checkpoint-2":
            (path / "trainer_state.json").unlink()
    done = run("lora_on_the_prompt.py", *numbers, folder=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    for name, weight in load_file(file).items():
        torch.testing.assert_close(weight, adapter[name])
    again = json.loads((tmp_path / "run" / "record.json").read_text())
    assert again["continuations"] == record["continuations"] and again["steps"] == record["steps"]

    text = "The keeper of the light is Ada.\n" * 9
    (tmp_path / "mine.txt").write_text(text)
    mine = (*common, "--document", "mine.txt")
    done = run("lora_on_the_prompt.py", *mine, "--prompts", "The keeper", "--output_dir", "mine", folder=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "recalled" not in done.stdout and "The keeper |" in done.stdout
    spread = (*mine, "--entries", 2, "--output_dir", "spread")
    refused = run("lora_on_the_prompt.py", *spread, "--model", "nowhere", folder=tmp_path)
    assert refused.returncode != 0 and not (tmp_path / "spread" / "settings.json").exists()
    done = run("lora_on_the_prompt.py", *spread, folder=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "recalled" in done.stdout
    (tmp_path / "mine.txt").write_text(text * 2)
    refused = run("lora_on_the_prompt.py", *spread, folder=tmp_path)
    assert refused.returncode != 0 and "document_sha256 was" in refused.stderr
    refused = run("lora_on_the_prompt.py", *common, "--prompts", "The keeper", folder=tmp_path)
    assert refused.returncode != 0 and "`--document`" in refused.stderr
