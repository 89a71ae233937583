"""A LoRA adapter as mlx-lm takes it: the same function, another hash, all else as with any model."""

import json

import mlx.core as mx
import mlx_lm.utils
import pytest
import tiny
from mlx.utils import tree_flatten
from mlx_lm.tuner.utils import linear_to_lora_layers

from m2r2kit import __main__ as cli
from m2r2kit.common import UserError
from m2r2kit.model.backbone import Backbone
from m2r2kit.model.families import DENSE, MOE
from m2r2kit.model.folder import trained_folder
from m2r2kit.speculation import M2R2, EarlyExit, generate
from m2r2kit.stream.registry import FORMS
from m2r2kit.stream.stream import AcceleratedStream, StreamConfig

TOKENS = mx.array([tiny.prompt(7)])


def make_adapter(family, folder, kind="lora", seed=0, layers=tiny.BLOCKS, **changes):
    """An adapter of random weights, written as `mlx_lm.lora` writes one."""
    model, _ = mlx_lm.utils.load_model(tiny.folder(family, **changes))
    settings = {"rank": 4, "scale": 8.0, "dropout": 0.1}
    linear_to_lora_layers(model, layers, settings, use_dora=kind == "dora")
    mx.random.seed(seed)
    parts = {"lora_a", "lora_b"}
    weights = {
        name: 0.2 * mx.random.normal(w.shape)
        for name, w in tree_flatten(model.parameters())
        if name.rsplit(".", 1)[-1] in parts
    }
    folder.mkdir(parents=True)
    mx.save_safetensors(str(folder / "adapters.safetensors"), weights)
    config = {"fine_tune_type": kind, "num_layers": layers, "lora_parameters": settings}
    config |= {"model": str(tiny.folder(family, **changes))}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def as_mlx_lm_loads(family, adapter):
    model, _ = mlx_lm.utils.load_model(tiny.folder(family))
    model = mlx_lm.utils.load_adapters(model, str(adapter))
    model.eval()
    return model


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("family", DENSE + MOE)
def test_logits_are_those_of_mlx_lm_and_the_hash_is_of_both(family, kind, tmp_path):
    if kind == "dora" and family in MOE:
        return  # mlx-lm makes none for experts
    adapter = make_adapter(family, tmp_path / "adapter", kind)
    view, model = Backbone.load(tiny.folder(family), adapter=adapter), as_mlx_lm_loads(family, adapter)
    assert mx.array_equal(view.logits(TOKENS), model(TOKENS))
    assert mx.abs(view.logits(TOKENS) - tiny.backbone(family).logits(TOKENS)).max() > 0.01
    other = make_adapter(family, tmp_path / "other", kind, seed=1)
    others = tiny.backbone(family), Backbone.load(tiny.folder(family), adapter=other)
    assert len({view.sha256, *(each.sha256 for each in others)}) == 3
    assert Backbone.of(model, view.tokenizer).sha256 == view.sha256


@pytest.mark.parametrize("family", DENSE + MOE)
def test_drafting_gives_the_tokens_of_plain_decoding(family, tmp_path):
    view = Backbone.load(tiny.folder(family), adapter=make_adapter(family, tmp_path / "adapter"))
    prompt, model = tiny.prompt(6), as_mlx_lm_loads(family, tmp_path / "adapter")
    plain, ids = generate(view, prompt, max_tokens=9).tokens, list(prompt)
    for _ in range(9):
        ids.append(model(mx.array([ids]))[0, -1].argmax().item())
    assert plain == ids[6:][: len(plain)] and (len(plain) == 9 or plain[-1] == tiny.EOS)
    drafters = [EarlyExit(view, 2)]
    for form in FORMS:
        if not (form == "block" and family in MOE):
            config = StreamConfig(
                exits=(2,), form=form, rank=4, ffn_width=12, deep=0.75, near=True, carry=False
            )
            mx.random.seed(1)
            drafters.append(M2R2(view, AcceleratedStream(view, config)))
    for drafter in drafters:
        assert generate(view, prompt, drafter, 3, max_tokens=9).tokens == plain, drafter


def test_the_folder_of_an_adapter_names_a_model_and_holds_what_is_trained_for_it(tmp_path, capsys):
    adapter = make_adapter("llama", tmp_path / "adapter")
    assert trained_folder(adapter, "stream") == adapter / "stream"
    view = Backbone.load(adapter)
    assert view.sha256 == Backbone.load(tiny.folder("llama"), adapter=adapter).sha256
    assert mx.array_equal(view.logits(TOKENS), as_mlx_lm_loads("llama", adapter)(TOKENS))
    said = []
    for model in (
        ["--model", str(adapter)],
        ["--model", str(tiny.folder("llama")), "--adapter", str(adapter)],
    ):
        ask = [*model, "--method", "plain", "--raw", "--prompt", "abc", "--max-tokens", "8", "--json"]
        assert cli.main(["generate", *ask]) == 0
        said.append(json.loads(capsys.readouterr().out)["tokens"])
    assert said[0] == said[1] == generate(view, view.encode("abc"), max_tokens=8).tokens


def test_an_adapter_that_names_no_model(tmp_path):
    adapter = make_adapter("llama", tmp_path / "adapter")
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(
        json.dumps({k: v for k, v in config.items() if k != "model"})
    )
    with pytest.raises(UserError, match="does not name its model; give the model, and this folder"):
        Backbone.load(adapter)


def sentence(adapter) -> str:
    with pytest.raises(UserError) as refusal:
        Backbone.load(tiny.folder("llama"), adapter=adapter)
    assert "\n" not in str(refusal.value) and str(refusal.value).endswith(".")
    return str(refusal.value)


def test_what_is_no_adapter_of_this_model(tmp_path):
    assert "has no adapter_config.json; give a folder that `mlx_lm.lora` wrote" in sentence(tmp_path)
    adapter = make_adapter("olmoe", tmp_path / "other")
    assert "does not fit this model" in sentence(adapter)
    adapter = make_adapter("llama", tmp_path / "adapter")
    weights = adapter / "adapters.safetensors"
    weights.write_bytes(weights.read_bytes()[:-9])
    assert "does not fit this model" in sentence(adapter)
    (adapter / "adapter_config.json").write_text("{}")
    assert "does not fit this model" in sentence(adapter)
    (adapter / "adapter_config.json").write_text("[")
    assert "is not valid JSON" in sentence(adapter)
