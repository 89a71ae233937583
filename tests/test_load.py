"""From a name to a loaded model, and from a model object to the same view."""

import json
import math
import os
import shutil

import mlx.core as mx
import mlx_lm.utils
import pytest
import tiny
import tiny_experts
from mlx.utils import tree_flatten

from m2r2kit import __main__ as cli
from m2r2kit.common import UserError
from m2r2kit.experts import packing
from m2r2kit.model import load
from m2r2kit.model.backbone import Backbone
from m2r2kit.model.families import DENSE, MOE
from m2r2kit.model.folder import model_folder, trained_folder
from m2r2kit.model.hashes import parameters_sha256, weights_sha256

FAMILIES = DENSE + MOE
TOKENS = mx.array([tiny.prompt(7)])


def as_mlx_lm_loads(folder):
    model, config = mlx_lm.utils.load_model(folder)
    return model, mlx_lm.utils.load_tokenizer(folder, eos_token_ids=config["eos_token_id"])


# --- quantised weights ----------------------------------------------------------------------

FORMATS = [("affine", bits, 32) for bits in (3, 4, 5, 6, 8)] + [("mxfp4", 4, 32), ("nvfp4", 4, 16)]


def quantised(tmp_path, mode="affine", bits=4, group=32):
    """The folder of a tiny quantised model, written by mlx-lm."""
    model, config = mlx_lm.utils.load_model(tiny.folder("olmoe", **tiny_experts.SIZES))
    model, config = mlx_lm.utils.quantize_model(model, config, group, bits, mode)
    return written(tmp_path / "quantised", model, config)


def written(folder, model, config):
    folder.mkdir()
    mlx_lm.utils.save_model(folder, model)
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny.folder("olmoe", **tiny_experts.SIZES) / name, folder)
    return folder


@pytest.mark.parametrize(("mode", "bits", "group"), FORMATS)
def test_decoded_weights_are_what_the_quantised_ones_multiply_by(tmp_path, mode, bits, group):
    folder = quantised(tmp_path, mode, bits, group)
    few, plain = (Backbone.load(folder, decode=decode) for decode in (False, True))
    assert plain.sha256 == few.sha256 == weights_sha256(folder)
    before = dict(tree_flatten(few.model.parameters()))
    after = dict(tree_flatten(plain.model.parameters()))
    assert all(w.dtype == mx.float32 for w in after.values())
    for name, w in after.items():
        q = before[name]
        if q.dtype == mx.uint32:
            path = name.removesuffix(".weight")
            scales, biases = before[f"{path}.scales"], before.get(f"{path}.biases")
            q = mx.dequantize(q, scales, biases, group, bits, mode)
        assert mx.array_equal(q, w), name
    if mode == "affine":  # the others run in bfloat16
        assert mx.allclose(few.logits(TOKENS), plain.logits(TOKENS), atol=1e-4)


def test_a_cpu_decodes_small_models_with_and_without_their_experts(tmp_path, monkeypatch):
    folder = quantised(tmp_path)
    on_cpu = mx.default_device() == mx.Device(mx.cpu)
    size = 4 * sum(w.size for _, w in tree_flatten(Backbone.load(folder, decode=True).model.parameters()))
    for most, plain in ((size, on_cpu), (size - 1, False)):
        monkeypatch.setattr(load, "DECODED", most)
        taken = packing.load_without_experts(folder)
        blocks = Backbone.load(folder).blocks[0], taken[0].blocks[0]
        found = [block.self_attn.q_proj for block in blocks]
        found += [blocks[0].mlp.switch_mlp.up_proj, taken[1][0].up_proj]
        assert [("scales" not in linear) for linear in found] == 4 * [plain]


def test_a_decoded_model_object_has_the_hash_of_its_folder(tmp_path):
    folder = quantised(tmp_path)
    for decode in (True, False):
        view = Backbone.load(folder, decode=decode)
        assert Backbone.of(view.model, view.tokenizer).sha256 == weights_sha256(folder)
    view.model.model.norm.weight = view.model.model.norm.weight + 1
    assert Backbone.of(view.model, view.tokenizer).sha256 == parameters_sha256(view.model)


# --- model objects --------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_object_gives_the_view_of_its_folder(family):
    loaded = tiny.backbone(family)
    view = Backbone.of(*as_mlx_lm_loads(tiny.folder(family)))
    assert mx.array_equal(view.logits(TOKENS), loaded.logits(TOKENS))
    assert (view.family, view.depth, view.width) == (family, tiny.BLOCKS, tiny.WIDTH)
    assert view.context == tiny.CONTEXT and view.eos == loaded.eos
    assert view.config["vocab_size"] == tiny.VOCABULARY
    assert view.sha256 == loaded.sha256 == weights_sha256(tiny.folder(family))


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_the_hash_does_not_depend_on_the_arithmetic(dtype):
    model, tokenizer = as_mlx_lm_loads(tiny.folder("llama"))
    model.set_dtype(dtype)
    narrow = parameters_sha256(model)
    assert Backbone.of(model, tokenizer).sha256 == weights_sha256(tiny.folder("llama"))
    model.set_dtype(mx.float32)  # the values of the narrow model, which the folder does not hold
    assert parameters_sha256(model) == narrow == Backbone.of(model, tokenizer).sha256


def test_a_changed_model_has_another_hash_and_a_model_without_a_folder_has_one():
    model, tokenizer = as_mlx_lm_loads(tiny.folder("llama"))
    model.model.norm.weight = model.model.norm.weight + 1
    changed = Backbone.of(model, tokenizer).sha256
    assert changed == parameters_sha256(model) != weights_sha256(tiny.folder("llama"))
    assert Backbone.of(model, tokenizer=object()).sha256 == changed


def test_what_is_no_language_model_is_refused():
    with pytest.raises(UserError, match="is not an mlx-lm language model"):
        Backbone.of(object(), object())


# --- what cannot be loaded ----------------------------------------------------------------


def sentence(folder) -> str:
    """The error for a folder, as the command line prints it."""
    with pytest.raises(UserError) as refusal:
        Backbone.load(folder)
    text = str(refusal.value)
    assert "\n" not in text and "Traceback" not in text and text.endswith(".")
    return text


@pytest.fixture
def folder(tmp_path):
    return tiny.make_folder("llama", tmp_path / "model")


def change_config(folder, **changes):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_a_missing_folder(tmp_path):
    assert f"There is no model folder {tmp_path / 'none'}" in sentence(tmp_path / "none")


def test_a_missing_config(folder):
    (folder / "config.json").unlink()
    assert "has no config.json" in sentence(folder)


@pytest.mark.parametrize("bytes_", [b"{", b"", b"[1]", b"\xff\xfe"])
def test_a_broken_config(folder, bytes_):
    (folder / "config.json").write_bytes(bytes_)
    assert "config.json is not valid JSON" in sentence(folder)


def test_a_config_without_a_size(folder):
    file = folder / "config.json"
    config = json.loads(file.read_text())
    for name in ("hidden_size", "num_attention_heads", "vocab_size"):
        file.write_text(json.dumps({key: value for key, value in config.items() if key != name}))
        assert f"has no usable {name}" in sentence(folder)
    file.write_text(json.dumps({key: value for key, value in config.items() if key != "rms_norm_eps"}))
    assert "config.json does not describe a model (" in sentence(folder)
    assert "rms_norm_eps" in sentence(folder)


def test_a_family_that_is_not_served_is_named_before_its_weights_are_read(folder):
    (folder / "model.safetensors").write_bytes(b"not weights")
    for family in ("mamba", "from_next_year", ["llama"]):
        change_config(folder, model_type=family)
        assert f"Models of type '{family}' are not supported; use one of llama," in sentence(folder)


@pytest.mark.parametrize(
    "changes",
    [{"rope_theta": "much"}, {"rope_scaling": {"rope_type": [1]}}, {"rms_norm_eps": "x"}, {"head_dim": 7}],
)
def test_a_config_of_impossible_values(folder, changes):
    change_config(folder, **changes)
    assert "config.json" in sentence(folder)


@pytest.mark.parametrize(
    ("family", "name", "values"),
    [
        ("llama", "rms_norm_eps", [math.nan, -1e-5]),
        ("llama", "rope_theta", [-5.0, math.inf, math.nan]),
        ("llama", "max_position_embeddings", [0, -4]),
        ("gemma2", "query_pre_attn_scalar", [-1, 0]),
        ("gemma2", "final_logit_softcapping", [0.0, -30.0]),
        ("olmoe", "num_experts_per_tok", [0, -1, 5]),
        ("mixtral", "num_experts_per_tok", [0, 5]),
        ("qwen3_moe", "num_experts_per_tok", [0, 5]),
    ],
)
def test_a_number_that_no_model_can_have(tmp_path, family, name, values):
    """mlx-lm accepts them: the logits are then NaN or of other experts, or the first pass raises."""
    folder = tiny.make_folder(family, tmp_path / "model")
    for value in values:
        change_config(folder, **{name: value})
        assert f"has no usable {name};" in sentence(folder)


@pytest.mark.parametrize("factor", [math.nan, math.inf, -2, 0])
def test_a_scaling_by_a_number_that_is_none(folder, factor):
    change_config(folder, rope_scaling={"rope_type": "linear", "factor": factor})
    assert "without a usable factor" in sentence(folder)


def test_an_auto_map_of_another_form(folder):
    for auto_map, said in (
        ("evil.Evil", "needs custom code (evil.Evil)"),
        (7, "needs custom code (7)"),
    ):
        change_config(folder, auto_map=auto_map)
        assert said in sentence(folder)
    change_config(folder, auto_map={"AutoConfig": None})
    assert f"The tokenizer of {folder} cannot be read" in sentence(folder)
    change_config(folder, auto_map=[])
    Backbone.load(folder)


def test_missing_weights(folder):
    (folder / "model.safetensors").unlink()
    assert "has no model*.safetensors" in sentence(folder)


@pytest.mark.parametrize("kept", [0, 5, 0.3, 0.99])
def test_truncated_weights(folder, kept):
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[: int(kept if kept >= 1 else kept * len(whole))])
    assert "damaged or cut short" in sentence(folder)


def test_weights_that_lack_a_matrix(folder):
    file = str(folder / "model.safetensors")
    weights = dict(mx.load(file))
    del weights["model.layers.1.mlp.up_proj.weight"]
    mx.save_safetensors(file, weights)
    assert "do not fit its config.json (" in sentence(folder) and "up_proj" in sentence(folder)


def test_a_missing_shard(folder):
    names = {"model.embed_tokens.weight": "model.safetensors", "lm_head.weight": "model-00002.safetensors"}
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": names}))
    assert "lacks model-00002.safetensors" in sentence(folder)
    index.write_text('{"weight_map": ')
    assert "index.json is not valid JSON" in sentence(folder)


def test_a_missing_or_broken_tokenizer(folder):
    (folder / "tokenizer.json").write_text("{")
    assert f"The tokenizer of {folder} cannot be read" in sentence(folder)
    for file in folder.glob("tokenizer*"):
        file.unlink()
    assert f"The tokenizer of {folder}" in sentence(folder)


def test_the_command_line_ends_with_2_and_no_traceback(folder, capsys):
    (folder / "model.safetensors").write_bytes(b"not weights")
    assert cli.main(["generate", "--model", str(folder), "--method", "plain", "--prompt", "x"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("m2r2kit: ") and err.count("\n") == 1 and "damaged or cut" in err


def test_a_file_in_the_place_of_a_folder(folder):
    assert "is a file; give a model folder" in sentence(folder / "model.safetensors")


def test_weights_that_do_not_fit_the_config(folder):
    change_config(folder, intermediate_size=40)
    assert "do not fit its config.json (" in sentence(folder)


def test_a_tokenizer_whose_package_is_missing(folder):
    (folder / "tokenizer.json").unlink()
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "tool_parser_type": "none_of_that_name"}
    tiny.write_tokenizer(folder)
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    assert "needs a package that is not installed (" in sentence(folder)


# --- which weights are the model's ----------------------------------------------------------


def split(folder):
    """The weights in two shards with an index; returns the index."""
    weights = mx.load(str(folder / "model.safetensors"))
    where = {}
    for number, names in enumerate((sorted(weights)[::2], sorted(weights)[1::2]), 1):
        name = f"model-{number:05d}-of-00002.safetensors"
        mx.save_safetensors(str(folder / name), {n: weights[n] for n in names}, metadata={"format": "mlx"})
        where |= dict.fromkeys(names, name)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    return where


@pytest.mark.parametrize("stray", ["model.safetensors", "model-00000.safetensors", "model-z.safetensors"])
def test_weights_beside_those_of_the_index_are_neither_read_nor_hashed(folder, stray):
    split(folder)
    right = weights_sha256(folder)
    other = tiny.make_folder("llama", folder.parent / "other", seed=1) / "model.safetensors"
    (folder / stray).write_bytes(other.read_bytes())
    view = Backbone.load(folder)
    assert mx.array_equal(view.logits(TOKENS), tiny.backbone("llama").logits(TOKENS))
    assert view.sha256 == weights_sha256(folder) == right
    assert Backbone.of(view.model, view.tokenizer).sha256 == right


def test_shards_of_other_names_are_read_as_the_index_says(folder):
    where = split(folder)
    for name in set(where.values()):
        (folder / name).rename(folder / name.replace("model-", "part-"))
    where = {name: file.replace("model-", "part-") for name, file in where.items()}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    assert mx.array_equal(Backbone.load(folder).logits(TOKENS), tiny.backbone("llama").logits(TOKENS))


def test_two_sets_of_weights_without_an_index(folder):
    split(folder)
    (folder / "model.safetensors.index.json").unlink()
    assert mx.array_equal(Backbone.load(folder).logits(TOKENS), tiny.backbone("llama").logits(TOKENS))
    (folder / "model.safetensors").write_bytes((tiny.folder("llama") / "model.safetensors").read_bytes())
    assert "no index that lists the model's files" in sentence(folder)


def test_a_tensor_in_two_shards(folder):
    split(folder)
    first, second = sorted(folder.glob("model-*.safetensors"))
    both = mx.load(str(first)) | mx.load(str(second))
    mx.save_safetensors(str(second), both)
    assert f"is in {first.name} and in {second.name}" in sentence(folder)


@pytest.mark.parametrize("index", [{}, {"weight_map": {}}, {"weight_map": {"a": "../model.safetensors"}}])
def test_an_index_that_names_nothing_of_the_folder(folder, index):
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "lists no weights" in sentence(folder)


@pytest.mark.parametrize("tied", [True, False])
def test_a_config_that_does_not_say_whether_the_head_is_tied(tmp_path, tied):
    folder = tiny.make_folder("llama", tmp_path / "model", tie_word_embeddings=tied)
    right = Backbone.load(folder).logits(TOKENS)
    file = folder / "config.json"
    config = json.loads(file.read_text())
    del config["tie_word_embeddings"]  # mlx-lm takes True, transformers False
    file.write_text(json.dumps(config))
    assert mx.array_equal(Backbone.load(folder).logits(TOKENS), right)


# --- code of a model's own ------------------------------------------------------------------


@pytest.fixture
def evil(folder, monkeypatch):
    """A folder with code that leaves a trace if it is run, and a `y` on standard input."""
    trace = folder / "ran"
    (folder / "evil.py").write_text(f"open({str(trace)!r}, 'w').close()\nclass Evil: pass\n")
    monkeypatch.setenv("HF_MODULES_CACHE", str(folder.parent / "modules"))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a question was asked"))
    yield folder
    assert not trace.exists()


def test_a_config_that_names_the_code_of_a_tokenizer(evil):
    change_config(evil, auto_map={"AutoTokenizer": "evil.Evil"})
    assert "The tokenizer of" in sentence(evil) and "custom code (evil.Evil)" in sentence(evil)


@pytest.mark.parametrize("auto_map", [{"AutoTokenizer": ["evil.Evil", None]}, ["evil.Evil", None]])
def test_a_tokenizer_with_code_of_its_own(evil, auto_map):
    file = evil / "tokenizer_config.json"
    settings = json.loads(file.read_text()) | {"auto_map": auto_map, "tokenizer_class": "Evil"}
    file.write_text(json.dumps(settings))
    assert "needs custom code (evil.Evil), which is not run here" in sentence(evil)


def test_a_model_with_code_of_its_own(evil):
    change_config(evil, model_file="evil.py")
    assert "needs custom code (evil.py)" in sentence(evil)
    change_config(evil, model_file=None, auto_map={"AutoModelForCausalLM": "evil.Evil"})
    assert "needs custom code (evil.Evil)" in sentence(evil)


def test_code_of_a_class_that_mlx_lm_has_is_not_needed_and_not_run(evil):
    auto_map = {"AutoConfig": "evil.LlamaConfig", "AutoModelForCausalLM": "evil.LlamaForCausalLM"}
    change_config(evil, auto_map=auto_map)
    assert mx.array_equal(Backbone.load(evil).logits(TOKENS), tiny.backbone("llama").logits(TOKENS))


# --- chat templates -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("template", "why"),
    [
        ("{{ raise_exception('no such role') }}", "no such role"),
        ("{% if messages %}", "end of template"),
        ("{{ messages[7].content.nothing }}", "list object has no element 7"),
        ("{{ 1 / 0 }}", "division by zero"),
        ([{"name": "a", "template": "x"}, {"name": "b", "template": "y"}], "no default"),
        ("{{ ''.__class__.__mro__[1].__subclasses__()[0]('x') }}", "unsafe"),  # it runs in a sandbox
    ],
)
def test_a_chat_template_that_fails(folder, template, why):
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"chat_template": template}))
    view = Backbone.load(folder)
    with pytest.raises(UserError, match=r"chat template fails \(.*; prompt without it \(--raw\)") as refusal:
        view.encode("hello")
    assert why in str(refusal.value)
    assert view.encode("hello", chat=False) == tiny.backbone("llama").encode("hello")


# --- where trained parts lie ----------------------------------------------------------------


def test_parts_of_a_folder_lie_in_it_and_those_of_a_repository_in_the_cache(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("M2R2KIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    assert trained_folder(folder, "stream") == folder / "stream"
    wanted = tmp_path / "cache" / "trained" / "some-org--tiny" / "stream"
    assert trained_folder("some-org/tiny", "stream") == wanted
    os.makedirs("some-org/tiny/stream")  # a folder that is no model
    assert trained_folder("some-org/tiny", "stream") == wanted
    os.rename(folder, "some-org/tiny/model")
    assert str(trained_folder("some-org/tiny/model", "exits")) == "some-org/tiny/model/exits"


def test_parts_of_a_fetched_model_lie_in_its_folder(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("M2R2KIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    fetched = tmp_path / "cache" / "models" / "smollm2"
    shutil.copytree(folder, fetched)
    assert model_folder("smollm2") == fetched
    assert trained_folder("smollm2", "stream") == fetched / "stream"
