"""Inits that change the base (PiSSA, OLoRA, LoRA-GA; PEFT's CorDA and LoftQ need packages more):
refused as they are, right once PEFT has converted them or with the base that they left.
"""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.config import LoraGAConfig
from peft.tuners.lora.loraga import preprocess_loraga

import edgelora
import oracle
import tiny
from edgelora.errors import EdgeLoraError
from test_adapter import change_config
from test_float_oracle import SHARE, TOKENS

IDS = torch.tensor([TOKENS])


def with_lora_ga(model: Any, config: LoraConfig) -> None:
    preprocess_loraga(model, config, lambda: model(IDS, labels=IDS).loss.backward())


def as_it_is(model: Any, config: LoraConfig) -> None: ...


Prepare = Callable[[Any, LoraConfig], None]
INITS: dict[str, tuple[dict[str, Any], Prepare]] = {
    "pissa": ({}, as_it_is),
    "pissa_niter_4": ({}, as_it_is),
    "olora": ({"use_rslora": True}, as_it_is),
    "lora_ga": ({"lora_ga_config": LoraGAConfig()}, with_lora_ga),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.tiny_llama(tmp_path_factory.mktemp("base"))


def trained(base: Path, init: str, untrained: Path) -> PeftModel:
    """`untrained`: where the adapter is saved before training, as PEFT's conversion wants it."""
    settings, prepare = INITS[init]
    settings = {"r": 4, "lora_alpha": 12, "target_modules": ["q_proj", "up_proj"], **settings}
    config = LoraConfig(task_type="CAUSAL_LM", init_lora_weights=init, **settings)
    model = oracle.float_model(base)
    with warnings.catch_warnings(action="ignore"):
        prepare(model, config)
        adapted = get_peft_model(model, config)
    adapted.peft_config["default"].init_lora_weights = True
    adapted.save_pretrained(untrained)
    adapted.peft_config["default"].init_lora_weights = init
    torch.manual_seed(7)
    for values in adapted.parameters():
        if values.requires_grad:
            values.data += 0.1 * torch.randn_like(values)
    return adapted.eval()


def exported(base: Path, adapter: Path, out: Path) -> Any:
    edgelora.export(base, out, adapters={"a": adapter}, format="float", report=False)
    with edgelora.load(out) as model:
        return model.logits(TOKENS, adapter="a")


@pytest.mark.parametrize("init", INITS)
def test_what_peft_converted_is_plain_lora(base: Path, init: str, tmp_path: Path) -> None:
    model = trained(base, init, tmp_path / "untrained")
    theirs = oracle.logits(model, TOKENS)
    converted, untrained = str(tmp_path / "a"), str(tmp_path / "untrained")
    with warnings.catch_warnings(action="ignore"):  # that a second adapter is there for a moment
        model.save_pretrained(converted, path_initial_model_for_weight_conversion=untrained)
    oracle.assert_close(exported(base, tmp_path / "a", tmp_path / "out"), theirs, SHARE)


@pytest.mark.parametrize("init", INITS)
def test_the_base_that_is_left_takes_the_adapter(base: Path, init: str, tmp_path: Path) -> None:
    """Once the config no longer says that a base is to be changed, as PEFT itself needs it."""
    model = trained(base, init, tmp_path / "untrained")
    theirs = oracle.logits(model, TOKENS)
    model.save_pretrained(tmp_path / "a")
    model.unload().save_pretrained(tmp_path / "left")
    tiny.write_tokenizer(tmp_path / "left")
    with pytest.raises(EdgeLoraError, match=f'/a: init_lora_weights = "{init}": .*another base'):
        exported(tmp_path / "left", tmp_path / "a", tmp_path / "out")
    change_config(tmp_path / "a", init_lora_weights=True)
    oracle.assert_close(
        exported(tmp_path / "left", tmp_path / "a", tmp_path / "out"), theirs, SHARE
    )


@pytest.mark.parametrize("init", [*INITS, "corda", "loftq"])
def test_the_refusal_says_what_to_do(base: Path, init: str, tmp_path: Path) -> None:
    """PEFT converts no LoftQ."""
    trained(base, "pissa", tmp_path / "untrained").save_pretrained(tmp_path / "a")
    change_config(tmp_path / "a", init_lora_weights=init)
    with pytest.raises(EdgeLoraError) as caught:
        exported(base, tmp_path / "a", tmp_path / "out")
    assert ("path_initial_model_for_weight_conversion" in str(caught.value)) == (init != "loftq")
    assert "model.unload().save_pretrained" in str(caught.value)
    assert "\n" not in str(caught.value)
