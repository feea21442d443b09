"""Adapters of PEFT: on LongNets, and on other models with dilated attention."""

import pytest
import torch
from models import KINDS, build, random_ids
from transformers import AutoModelForCausalLM, CompileConfig, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from longnet_hf import LongNetForCausalLM, LongNetForSequenceClassification, set_dilated_attention


peft = pytest.importorskip("peft")
PATTERN = dict(segment_lengths=[8, 16, 40], dilation_rates=[1, 2, 3], head_offset="rotating")


def build_llama():
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
            num_key_value_heads=2, initializer_range=0.2, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2,
        )
    )  # fmt: skip


SOURCES = {
    **{kind: lambda kind=kind: build(LongNetForCausalLM, kind) for kind in KINDS},
    "from_llama": lambda: LongNetForCausalLM.from_llama(build_llama(), **PATTERN),
    "other": lambda: set_dilated_attention(build_llama(), **PATTERN),
}


def train(model, folder, **options):
    """Three steps of Trainer on packed rows."""
    rows = [{"input_ids": row, "labels": row} for row in random_ids(6, 50).tolist()]
    for row in rows:
        row["position_ids"] = [*range(31), *range(19)]
    arguments = TrainingArguments(
        folder, max_steps=3, learning_rate=1e-2, use_cpu=True, report_to="none", disable_tqdm=True,
        per_device_train_batch_size=2, save_strategy="no", **options,
    )  # fmt: skip
    Trainer(model, arguments, train_dataset=rows).train()
    return model.eval()


@pytest.mark.parametrize("source", SOURCES)
def test_adapters_are_trained_saved_loaded_and_merged(source, tmp_path):
    base, ids = SOURCES[source](), random_ids(2, 45)
    base.save_pretrained(tmp_path / "base")
    untouched = {name: x.clone() for name, x in base.state_dict().items()}
    before = base.eval()(ids).logits
    # Without `target_modules`
    model = peft.get_peft_model(base, peft.LoraConfig(task_type="CAUSAL_LM", r=4))
    trained = [name for name, x in model.named_parameters() if x.requires_grad]
    assert trained and all(".q_proj.lora_" in name or ".v_proj.lora_" in name for name in trained)
    train(model, tmp_path / "run", gradient_checkpointing=True)
    expected = model(input_ids=ids).logits
    assert (expected - before).abs().max() > 1e-3
    for name, x in model.get_base_model().state_dict().items():
        if "lora_" not in name:
            assert torch.equal(x, untouched[name.replace(".base_layer", "")])
    generated = model.generate(input_ids=ids, max_new_tokens=10, min_new_tokens=10, do_sample=False)

    model.save_pretrained(tmp_path / "adapter")
    assert not list((tmp_path / "adapter").glob("*.bin"))
    loaded = peft.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter"
    )
    torch.testing.assert_close(loaded.eval()(input_ids=ids).logits, expected)
    merged = loaded.merge_and_unload()
    torch.testing.assert_close(merged(ids).logits, expected, rtol=1e-3, atol=1e-4)
    merged.save_pretrained(tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert type(merged) is type(base) and merged.config._attn_implementation == base.config._attn_implementation
    torch.testing.assert_close(merged(ids).logits, expected, rtol=1e-3, atol=1e-4)
    again = merged.generate(ids, max_new_tokens=10, min_new_tokens=10, do_sample=False)
    assert again.tolist() == generated.tolist()


SOFT_PROMPTS = {
    "prompt tuning": lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    "p-tuning": lambda: peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=4, encoder_hidden_size=16),
    "prefix tuning": lambda: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    "context": lambda: peft.CPTConfig(
        task_type="CAUSAL_LM", cpt_token_ids=[3, 4, 5, 6], cpt_mask=[1] * 4, cpt_tokens_type_mask=[1, 2, 3, 4]
    ),
}


@pytest.mark.parametrize("prompt", SOFT_PROMPTS)
@pytest.mark.parametrize("kind", ["llama", "hybrid", "heads"])
def test_soft_prompts_are_continued(kind, prompt):
    """Through caches, behind left padding, as step by step without a cache."""
    model = peft.get_peft_model(build(LongNetForCausalLM, kind), SOFT_PROMPTS[prompt]()).eval()
    for weight in model.parameters():
        if weight.requires_grad:
            torch.nn.init.normal_(weight)
    ids = random_ids(2, 11)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    options = dict(max_new_tokens=50, eos_token_id=None, do_sample=False)
    together = model.generate(input_ids=ids, attention_mask=mask, **options)[:, 11:]
    # The cache has room for the prompt, too
    compiled = model.generate(input_ids=ids, attention_mask=mask, compile_config=CompileConfig(mode=None), **options)
    assert torch.equal(compiled[:, 11:], together)
    for row, start in ((0, 4), (1, 0)):
        alone = ids[row : row + 1, start:]
        assert torch.equal(model.generate(input_ids=alone, **options)[0, 11 - start :], together[row])
        for _ in range(50):
            next_id = model(input_ids=alone, attention_mask=torch.ones_like(alone)).logits[:, -1:].argmax(-1)
            alone = torch.cat((alone, next_id), dim=1)
        assert torch.equal(alone[0, 11 - start :], together[row])
    base = model.get_base_model()
    assert torch.equal(base.generate(ids, **options), base.generate(ids, use_cache=False, **options))


def test_soft_prompts_before_a_classifier():
    config = peft.PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=4)
    model = peft.get_peft_model(build(LongNetForSequenceClassification, num_labels=3), config).eval()
    row = random_ids(1, 11)
    alone = model(input_ids=row, attention_mask=torch.ones_like(row)).logits
    for padding in ((3, 0), (0, 3)):
        ids = torch.nn.functional.pad(row, padding, value=50)
        mask = torch.nn.functional.pad(torch.ones_like(row), padding)
        torch.testing.assert_close(model(input_ids=ids, attention_mask=mask).logits, alone)


@pytest.mark.parametrize("kind", ["paper", "llama"])
@pytest.mark.parametrize("name", ["IA3", "Vera", "AdaLora", "LNTuning", "LoKr", "LoHa", "FourierFT", "BOFT", "OSF"])
def test_adapters_know_what_to_adapt(name, kind):
    options = dict(total_step=10) if name == "AdaLora" else {}
    config = getattr(peft, f"{name}Config")(task_type="CAUSAL_LM", **options)
    model = peft.get_peft_model(build(LongNetForCausalLM, kind, num_key_value_heads=4), config)
    trained = {part for key, x in model.named_parameters() if x.requires_grad for part in key.split(".")}
    assert trained & {"q_proj", "v_proj", "input_layernorm"}
    ids = random_ids(1, 20)
    model(input_ids=ids, labels=ids).loss.backward()
    assert any(x.grad is not None and x.grad.isfinite().all() for x in model.parameters() if x.requires_grad)


def test_every_table_that_knows_llama_knows_longnet():
    from peft.utils import constants

    tables = {name: x for name, x in vars(constants).items() if name.startswith("TRANSFORMERS_MODELS_TO")}
    assert len(tables) > 20
    for name, table in tables.items():
        assert ("longnet" in table) == ("llama" in table), name


@pytest.mark.parametrize("source", ["paper", "from_llama", "other"])
def test_embeddings_and_norms_are_trained_as_in_longlora_and_stay_tied(source, tmp_path):
    """LongLoRA (arXiv 2309.12307, section 3.3)."""
    base, ids = SOURCES[source](), random_ids(1, 45)
    base.save_pretrained(tmp_path / "base")
    norms = sorted({name.rsplit(".", 2)[-2] for name, _ in base.named_parameters() if "norm" in name})
    config = peft.LoraConfig(
        task_type="CAUSAL_LM",
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
        modules_to_save=["embed_tokens", *norms],
        ensure_weight_tying=True,
    )
    model = train(peft.get_peft_model(base, config), tmp_path / "run")
    head, embeddings = (f() for f in (base.get_output_embeddings, base.get_input_embeddings))
    weight = embeddings.modules_to_save["default"].weight
    head = getattr(head, "modules_to_save", {"default": head})["default"]
    assert head.weight is weight and not torch.equal(weight, embeddings.original_module.weight)
    expected = model(input_ids=ids).logits
    model.save_pretrained(tmp_path / "adapter")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    merged = peft.PeftModel.from_pretrained(loaded, tmp_path / "adapter").merge_and_unload()
    torch.testing.assert_close(merged.eval()(ids).logits, expected, rtol=1e-3, atol=1e-4)
    merged.save_pretrained(tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(again(ids).logits, expected, rtol=1e-3, atol=1e-4)
    assert again.config.tie_word_embeddings and again.lm_head.weight is again.model.embed_tokens.weight


def test_all_linear_takes_every_projection_but_the_head():
    model = peft.get_peft_model(SOURCES["from_llama"](), peft.LoraConfig(target_modules="all-linear"))
    adapted = {name.split(".")[-2] for name, x in model.named_modules() if name.endswith("lora_A")}
    assert adapted == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def test_an_adapter_with_a_base_finds_it_by_itself(tmp_path):
    base, ids = SOURCES["from_llama"](), random_ids(1, 45)
    base.save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    config = peft.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False)
    model = peft.get_peft_model(base, config).eval()
    model.save_pretrained(tmp_path / "adapter")
    for auto in (peft.AutoPeftModelForCausalLM, AutoModelForCausalLM):
        loaded = auto.from_pretrained(tmp_path / "adapter")
        torch.testing.assert_close(loaded(ids).logits, model(ids).logits)


@pytest.mark.parametrize("is_longnet", [True, False])
def test_an_adapter_does_not_name_a_base_with_other_attention(is_longnet, tmp_path):
    """`AutoPeftModel` would load it on the dense model, and say nothing."""
    build_llama().save_pretrained(tmp_path / "llama")
    if is_longnet:
        base = LongNetForCausalLM.from_llama(tmp_path / "llama", **PATTERN)
    else:
        base = set_dilated_attention(AutoModelForCausalLM.from_pretrained(tmp_path / "llama"), **PATTERN)
    for name, expected in (("unsaved", None), ("saved", str(tmp_path / "base"))):
        model = peft.get_peft_model(base, peft.LoraConfig(task_type="CAUSAL_LM"))
        model.save_pretrained(tmp_path / name)
        assert peft.PeftConfig.from_pretrained(tmp_path / name).base_model_name_or_path == expected
        model.unload().save_pretrained(tmp_path / "base")
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        if not is_longnet:  # which may be said again
            set_dilated_attention(base, **PATTERN)
    wrapped = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "llama"), peft.LoraConfig())
    set_dilated_attention(wrapped.get_base_model(), **PATTERN)
    wrapped.save_pretrained(tmp_path / "wrapped")
    assert peft.PeftConfig.from_pretrained(tmp_path / "wrapped").base_model_name_or_path is None
    assert peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "saved").config._attn_implementation == (
        "sdpa" if is_longnet else "dilated"
    )


def test_qlora(tmp_path):
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    ids = random_ids(1, 45)
    LongNetForCausalLM.from_llama(build_llama(), **PATTERN).save_pretrained(tmp_path / "base")
    four_bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=four_bits, dtype=torch.float32)
    assert type(base.model.layers[0].self_attn.q_proj).__name__ == "Linear4bit"
    model = peft.get_peft_model(peft.prepare_model_for_kbit_training(base), peft.LoraConfig(task_type="CAUSAL_LM"))
    before = model(input_ids=ids, labels=ids).loss
    train(model, tmp_path / "run")
    assert model(input_ids=ids).logits.isfinite().all()
    assert model(input_ids=ids, labels=ids).loss != before
