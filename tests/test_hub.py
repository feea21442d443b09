"""The code travels with the weights: models load, train and are shared again where `longnet_hf` is not installed."""

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from local_hub import LocalHub
from models import build, random_ids
from processes import HANG_LIMIT
from safetensors import safe_open
from test_slides import batch_of, build_slide, random_slides
from transformers.dynamic_module_utils import get_imports

from longnet_hf import (
    LongNetForCausalLM,
    LongNetForSequenceClassification,
    LongNetModel,
    LongNetSlideModel,
)


ROOT = Path(__file__).parent.parent
CODE = {
    "configuration_longnet.py",
    "batch_layout.py",
    "context_parallel.py",
    "dilated_cache.py",
    "dilated_kernels.py",
    "dilated_operator.py",
    "dilated_past.py",
    "dilated_pattern.py",
    "dilated_tiles.py",
    "documents.py",
    "generation_longnet.py",
    "hub_longnet.py",
    "modeling_longnet.py",
    "pattern_report.py",
    "torchscale_weights.py",
}
IMPORTS = """
import torch
from transformers import (AutoModel, AutoModelForCausalLM, AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification, AutoModelForTokenClassification, Trainer, TrainingArguments)
"""
WITHOUT_PACKAGE = 'import sys; sys.modules["longnet_hf"] = None'  # importing it fails, even where it is installed


@pytest.fixture(scope="module")
def hub():
    with LocalHub() as server:
        yield server


def run(code, hub, cache, package=False):
    """Run `code` in a new process that sees the test hub."""
    environment = hub.env(cache) | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}" if package else ""}
    code = ("import longnet_hf" if package else WITHOUT_PACKAGE) + IMPORTS + textwrap.dedent(code)
    command, options = [sys.executable, "-c", code], dict(capture_output=True, text=True, timeout=HANG_LIMIT)
    done = subprocess.run(command, env=environment, cwd=cache, **options)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_code_that_travels_asks_for_nothing_but_dependencies(tmp_path):
    """Transformers refuses code from the Hub if it imports, outside of `try`, what is not installed."""
    build(LongNetForCausalLM).save_pretrained(tmp_path / "language")
    build_slide().save_pretrained(tmp_path / "slide")
    files = [file for folder in tmp_path.iterdir() for file in folder.glob("*.py")]
    needed = {name for file in files for name in get_imports(file)} - set(sys.stdlib_module_names)
    assert {file.name for file in files} > CODE
    assert needed <= {"torch", "transformers", "accelerate", "safetensors", "numpy", "huggingface_hub", "tqdm"}


@pytest.mark.parametrize("model_class", [LongNetForCausalLM, LongNetModel, LongNetForSequenceClassification])
def test_a_saved_folder_serves_every_auto_class_without_the_package(model_class, tmp_path, hub):
    model, ids = build(model_class, "heads"), random_ids(1, 40)
    model.save_pretrained(tmp_path / "my model-1.5")
    names = {path.name for path in (tmp_path / "my model-1.5").iterdir()}
    assert names >= CODE | {"config.json", "model.safetensors", "README.md"}
    assert not [name for name in names if name.endswith((".bin", ".pt", ".pkl"))]
    with safe_open(tmp_path / "my model-1.5" / "model.safetensors", "pt") as weights:
        assert len(weights.keys()) > 20
    torch.save((ids, getattr(model, "model", model)(ids).last_hidden_state), tmp_path / "expected.pt")
    out = run(
        f"""
        ids, expected = torch.load(r"{tmp_path}/expected.pt")
        for auto in (AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification,
                     AutoModelForTokenClassification, AutoModelForQuestionAnswering):
            model = auto.from_pretrained(r"{tmp_path}/my model-1.5", trust_remote_code=True)
            model(ids)
            hidden = getattr(model, "model", model)(ids).last_hidden_state
            print(type(model).__name__, torch.allclose(hidden, expected, atol=1e-5))
        """,
        hub,
        tmp_path,
    )
    assert out.count("True") == 5 and "LongNetForQuestionAnswering" in out


def test_a_slides_encoder_loads_without_the_package(tmp_path, hub):
    model, slides = build_slide(LongNetSlideModel, dtype=torch.float32), random_slides(20, 30, dtype=torch.float32)
    model.save_pretrained(tmp_path / "slides")
    names = {path.name for path in (tmp_path / "slides").iterdir()}
    assert names >= CODE | {"modeling_longnet_slide.py"}
    assert "| vocabulary | none |" in (tmp_path / "slides" / "README.md").read_text()
    batch = batch_of(slides)
    torch.save((batch, model(**batch).pooler_output), tmp_path / "expected.pt")
    out = run(
        f"""
        from transformers import AutoModelForImageClassification
        batch, expected = torch.load(r"{tmp_path}/expected.pt")
        for auto, kwargs in ((AutoModel, dict()), (AutoModelForImageClassification, dict(num_labels=3))):
            model = auto.from_pretrained(r"{tmp_path}/slides", trust_remote_code=True, **kwargs)
            model(**batch)
            encoder = getattr(model, "model", model)
            print(type(model).__name__, torch.allclose(encoder(**batch).pooler_output, expected, atol=1e-5))
            model.save_pretrained(r"{tmp_path}/again")
        again = AutoModelForImageClassification.from_pretrained(r"{tmp_path}/again", trust_remote_code=True)
        print(torch.equal(again(**batch).logits, model(**batch).logits))
        """,
        hub,
        tmp_path,
    )
    assert out.split() == ["LongNetSlideModel", "True", "LongNetForSlideClassification", "True", "True"]


def test_push_pull_train_and_push_again(tmp_path, hub):
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir(), second.mkdir()
    run(
        """
        from models import build
        build(longnet_hf.LongNetForCausalLM, "hybrid").push_to_hub("tester/longnet")
        """,
        hub,
        first,
        package=True,
    )
    files = hub.files("tester/longnet")
    assert set(files) >= CODE | {"config.json", "model.safetensors", "README.md", "generation_config.json"}
    pytest.importorskip("matplotlib")
    assert files["longnet_pattern.png"].startswith(b"\x89PNG") and b"](longnet_pattern.png)" in files["README.md"]
    card = files["README.md"].decode()
    for said in (
        "library_name: transformers",
        "text-generation",
        "64 tokens",
        "Some layers or heads attend to everything",
        "| 2 | segment | 40 | 3 |",
        "ding2023longnet",
    ):
        assert said in card
    assert 'from_pretrained("tester/longnet", trust_remote_code=True)' in card
    out = run(
        """
        model = AutoModelForCausalLM.from_pretrained("tester/longnet", trust_remote_code=True).train()
        ids = torch.arange(3, 80)[None]
        before = model(ids, labels=ids).loss
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        before.backward()
        optimizer.step()
        after = model(ids, labels=ids).loss
        print(before.item() > after.item())
        model.push_to_hub("tester/longnet")
        model.push_to_hub("tester/copy")
        again = AutoModelForCausalLM.from_pretrained("tester/copy", trust_remote_code=True, force_download=True)
        print(torch.equal(again(ids).logits, model.eval()(ids).logits))
        AutoModelForTokenClassification.from_pretrained("tester/copy", trust_remote_code=True)(ids)
        """,
        hub,
        second,
    )
    assert out.split() == ["True", "True"]
    assert hub.files("tester/longnet")["model.safetensors"] != files["model.safetensors"]
    assert hub.files("tester/longnet")["README.md"].decode() == card  # a card that is there is kept
    assert 'from_pretrained("tester/copy"' in hub.files("tester/copy")["README.md"].decode()
    for name in CODE:
        assert hub.files("tester/copy")[name] == files[name]


def test_trainer_and_adapters_push_too(tmp_path, hub):
    for name in ("accelerate", "peft", "trl", "datasets"):
        pytest.importorskip(name)
    out = run(
        f"""
        import peft
        from models import build, random_ids
        model = build(longnet_hf.LongNetForCausalLM)
        model.save_pretrained("base", push_to_hub=True, repo_id="tester/base")
        rows = [{{"input_ids": row, "labels": row}} for row in random_ids(4, 20).tolist()]
        arguments = TrainingArguments(r"{tmp_path}/trained", max_steps=1, use_cpu=True, report_to="none",
                                      push_to_hub=True, hub_model_id="tester/trained", disable_tqdm=True)
        trainer = Trainer(model, arguments, train_dataset=rows)
        trainer.train()
        trainer.push_to_hub()
        trainer.push_to_hub()
        model.push_to_hub("tester/trained")
        from huggingface_hub import HfApi, ModelCard
        card = ModelCard.load(r"{tmp_path}/trained/README.md")
        card.text = "## Training procedure"  # as Trainer leaves it by itself
        HfApi().create_repo("tester/mended")
        HfApi().upload_file(path_or_fileobj=str(card).encode(), path_in_repo="README.md", repo_id="tester/mended")
        model.push_to_hub("tester/mended")
        import datasets, trl
        from models import word_tokenizer
        arguments = trl.SFTConfig(r"{tmp_path}/trl", use_cpu=True, bf16=False, report_to="none", push_to_hub=True,
                                  hub_model_id="tester/trl", disable_tqdm=True)
        trl.SFTTrainer(model, args=arguments, processing_class=word_tokenizer(),
                       train_dataset=datasets.Dataset.from_list([{{"text": "word3 word4"}}])).push_to_hub()
        base = AutoModelForCausalLM.from_pretrained("tester/base")
        adapter = peft.get_peft_model(base, peft.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False))
        adapter.push_to_hub("tester/adapter")
        """,
        hub,
        tmp_path,
        package=True,
    )
    card = hub.files("tester/trained")["README.md"].decode()
    for said in ("generated_from_trainer", "## Training procedure", "- longnet", "pipeline_tag: text-generation",
                 'from_pretrained("tester/trained", trust_remote_code=True)', "| 1 | segment | 16 | 2 |"):  # fmt: skip
        assert said in card
    assert card.count("trust_remote_code=True") == card.count("## Training procedure") == 1
    by_trl, mended = (hub.files(f"tester/{name}")["README.md"].decode() for name in ("trl", "mended"))
    assert "## Training procedure" in mended and "sft" in by_trl
    pytest.importorskip("matplotlib")
    for name in ("trained", "trl", "mended", "base"):
        pushed = hub.files(f"tester/{name}")
        assert "longnet_pattern.png" in pushed and b"](longnet_pattern.png)" in pushed["README.md"]
    for card in (by_trl, mended):
        assert card.count("trust_remote_code=True") == 1 and "dilated-attention" in card
    assert set(hub.files("tester/trained")) >= CODE and set(hub.files("tester/base")) >= CODE
    assert "| 1 | segment | 16 | 2 |" in hub.files("tester/base")["README.md"].decode()
    out = run(
        """
        import peft
        ids = torch.arange(3, 80)[None]
        print(AutoModelForCausalLM.from_pretrained("tester/trained", trust_remote_code=True)(ids).logits.shape[-1])
        base = AutoModelForCausalLM.from_pretrained("tester/base", trust_remote_code=True)
        model = peft.PeftModel.from_pretrained(base, "tester/adapter")
        print(type(model.base_model.model).__name__, model(input_ids=ids).logits.shape[-1])
        for auto in (peft.AutoPeftModelForCausalLM, AutoModelForCausalLM):
            again = auto.from_pretrained("tester/adapter", trust_remote_code=True)
            print(torch.allclose(again(ids).logits, model.eval()(input_ids=ids).logits, atol=1e-5))
        new = peft.get_peft_model(AutoModelForCausalLM.from_pretrained("tester/base", trust_remote_code=True),
                                  peft.LoraConfig())
        print(sum("q_proj.lora_A.default" in name for name, _ in new.named_parameters()))
        """,
        hub,
        tmp_path,
    )
    assert out.split() == ["97", "LongNetForCausalLM", "97", "True", "True", "3"]


def test_branches_and_pull_requests_keep_their_cards(tmp_path, hub):
    run(
        """
        from pathlib import Path
        from huggingface_hub import HfApi
        from models import build
        model, api = build(longnet_hf.LongNetForCausalLM), HfApi()
        api.create_repo("tester/branched")
        model.push_to_hub("tester/branched", revision="dev")
        where = dict(repo_id="tester/branched", revision="dev")
        api.upload_file(path_or_fileobj=b"by hand", path_in_repo="README.md", **where)
        model.push_to_hub("tester/branched", revision="dev")
        model.push_to_hub("tester/branched", create_pr=True)
        api.create_repo("tester/hand")
        api.upload_file(path_or_fileobj=b"by hand", path_in_repo="README.md", repo_id="tester/hand")
        model.push_to_hub("tester/hand")
        Path("hand").mkdir()
        Path("hand/pattern.png").write_bytes(b"by hand")
        model.save_pretrained("hand", push_to_hub=True, repo_id="tester/hand")
        """,
        hub,
        tmp_path,
        package=True,
    )
    assert "README.md" not in hub.files("tester/branched")
    assert hub.files("tester/branched", "dev")["README.md"] == b"by hand"
    assert b"ding2023longnet" in hub.files("tester/branched", "refs/pr/1")["README.md"]
    pytest.importorskip("matplotlib")
    assert "longnet_pattern.png" in hub.files("tester/branched", "refs/pr/1")
    by_hand = hub.files("tester/hand")
    assert by_hand["README.md"].endswith(b"by hand") and "longnet_pattern.png" not in by_hand
    assert (tmp_path / "hand" / "pattern.png").read_bytes() == b"by hand"
