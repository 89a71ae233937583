"""The folder of a model: which one a name means, what has to lie in it, and what must not.

Nothing of a model's folder is run: neither mlx-lm nor transformers may import code from it.
"""

import struct
from pathlib import Path

from ..common import UserError, cache_dir, missing_advice, parse_json
from .families import FAMILIES, check_served
from .hub import looks_like_repository, repository

INDEX = "model.safetensors.index.json"
FETCHED = ("smollm2",)  # models with a name of their own, from `m2r2kit fetch`
ADAPTER = ("adapter_config.json", "adapters.safetensors")


def model_folder(path_or_repo: str | Path) -> Path:
    """The folder of a model, complete as far as can be seen without loading it.

    A folder without config.json is no model: a repository of that name is then looked for.

    Raises:
        UserError: there is none, it is incomplete, of another family, or asks for code of its own.
    """
    folder = Path(path_or_repo)
    if str(path_or_repo) in FETCHED:
        folder = fetched(str(path_or_repo))
    elif not (folder / "config.json").exists():
        if folder.is_file():
            raise UserError(f"{folder} is a file; give the folder of a model.")
        if looks_like_repository(str(path_or_repo)):
            folder = repository(str(path_or_repo))
        elif not folder.exists():
            what_to_do = missing_advice(folder, "give a folder or a Hugging Face repository")
            raise UserError(f"There is no model folder {folder}; {what_to_do}.")
    if not (folder / "config.json").exists():
        raise UserError(f"{folder} has no config.json; copy the model's folder again, whole.")
    config = read_json(folder / "config.json")
    check_served(config)  # before gigabytes are read
    check_no_code(folder, config)
    weight_files(folder)
    return folder


def fetched(name: str) -> Path:
    """The folder of a model that `m2r2kit fetch` brings.

    Raises:
        UserError: it has not been fetched.
    """
    folder = cache_dir() / "models" / name
    if not (folder / "config.json").exists():
        raise UserError(f"The model {name} is not here yet; run `m2r2kit fetch {name}` once (93 MB).")
    return folder


def weight_files(folder: Path) -> list[Path]:
    """The files that hold a model's weights: those that its index names, and no others beside them.

    Raises:
        UserError: one is missing, or it cannot be said which belong to the model.
    """
    index = folder / INDEX
    if index.exists():
        named = read_json(index).get("weight_map")
        names = set(map(str, named.values())) if isinstance(named, dict) else set()
        if not names or any(Path(name).name != name for name in names):
            raise UserError(f"{index} names no weights; copy the model's folder again, whole.")
        files = [folder / name for name in sorted(names)]
        if missing := [file.name for file in files if not file.exists()]:
            raise UserError(f"{folder} lacks {missing[0]}; copy the model's folder again, whole.")
        return files
    files = sorted(folder.glob("model*.safetensors"))
    if not files:
        raise UserError(f"{folder} has no model*.safetensors; copy the model's folder again, whole.")
    if len(files) > 1 and folder / "model.safetensors" in files:
        other = next(file.name for file in files if file.name != "model.safetensors")
        raise UserError(
            f"{folder} has model.safetensors, {other} and no index that says which are the model's; "
            "remove those that are not."
        )
    return files


def trained_folder(model: str | Path, kind: str) -> Path:
    """Where what is trained for a model lies by default.

    Args:
        kind: `stream`, `drafters`, `exits` or `predictors`.

    Inside the folder of a model or an adapter; for a repository in the cache folder, because a folder of its
    name in the working directory would be taken for the model.
    """
    folder = Path(model)
    if any((folder / name).exists() for name in ("config.json", ADAPTER[0])):
        return folder / kind
    if looks_like_repository(str(model)):
        return cache_dir() / "trained" / str(model).replace("/", "--") / kind
    return folder / kind


def check_no_code(folder: Path, config: dict) -> None:
    """Refuse a model that needs code of its own. None is ever run: transformers is told not to trust any, and
    its chat templates run in a sandbox."""
    if config.get("model_file"):
        raise UserError(f"{folder} needs code of its own ({config['model_file']}), which is not run here.")
    classes, auto_map = FAMILIES[config["model_type"]].classes, config.get("auto_map")
    for name, wanted in (("AutoConfig", "Config"), ("AutoModelForCausalLM", "ForCausalLM")):
        code = auto_map.get(name) if isinstance(auto_map, dict) else None
        if code and str(code).rsplit(".", 1)[-1] != classes + wanted:  # the same class is in mlx-lm
            raise UserError(f"{folder} needs code of its own ({code}), which is not run here.")
    file = folder / "tokenizer_config.json"
    settings = read_json(file) if file.exists() else {}
    for code in (settings.get("auto_map"), auto_map):
        code = code.get("AutoTokenizer") if isinstance(code, dict) else code
        code = next((str(each) for each in code if each), None) if isinstance(code, list) else code
        if code:
            raise UserError(
                f"The tokenizer of {folder} needs code of its own ({code}), which is not run here."
            )


def read_config(folder: Path) -> dict:
    """A folder's config.json, which also says whether the head is tied: without a word of it mlx-lm assumes
    one thing and transformers the other, and the weights decide."""
    config = read_json(folder / "config.json")
    if "tie_word_embeddings" not in config:
        names = tensor_names(folder)
        config["tie_word_embeddings"] = not any(name.startswith("lm_head.") for name in names)
    return config


def tensor_names(folder: Path) -> dict[str, Path]:
    """Where each tensor of a model lies, by the headers of its files.

    Raises:
        UserError: a header is damaged, or a tensor lies in two files.
    """
    found: dict[str, Path] = {}
    for file in weight_files(folder):
        try:
            with file.open("rb") as stream:
                (length,) = struct.unpack("<Q", stream.read(8))
                if length > file.stat().st_size:
                    raise ValueError("its header is longer than the file")
                header = parse_json(stream.read(length))
            names = header.keys() - {"__metadata__"}
        except OSError as error:
            raise UserError(f"{file} cannot be read: {error.strerror or error}.") from error
        except (struct.error, ValueError, AttributeError) as error:
            raise UserError(f"{file} is damaged or cut short ({error}); copy it again.") from error
        for name in names & found.keys():
            raise UserError(f"{name} lies in {found[name].name} and in {file.name}; remove what is not used.")
        found |= dict.fromkeys(names, file)
    return found


def read_json(path: Path) -> dict:
    """The object in a JSON file of a model."""
    try:
        value = parse_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"There is no {path}; copy the model's folder again, whole.") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}.") from error
    except (ValueError, RecursionError):  # no JSON, or not even text
        value = None
    if not isinstance(value, dict):
        raise UserError(f"{path} is not valid JSON; copy the model's folder again, whole.")
    return value
