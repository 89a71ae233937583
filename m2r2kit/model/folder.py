"""Finds the folder of a model and checks its content.

No code in a model's folder is run: neither mlx-lm nor transformers may import it.
"""

import struct
from pathlib import Path

from ..common import UserError, cache_dir, missing_advice, parse_json
from .families import FAMILIES, check_supported
from .hub import looks_like_repository, repository

INDEX = "model.safetensors.index.json"
FETCHED = ("smollm2",)  # names of models that `m2r2kit fetch` downloads
ADAPTER = ("adapter_config.json", "adapters.safetensors")


def model_folder(path_or_repo: str | Path) -> Path:
    """The folder of a model, checked as far as possible without loading it.

    A folder without config.json is not a model; a repository of the same name is then looked up.

    Raises:
        UserError: the folder is missing or incomplete, or the model is of an unsupported family or needs
            custom code.
    """
    folder = Path(path_or_repo)
    if str(path_or_repo) in FETCHED:
        folder = fetched(str(path_or_repo))
    elif not (folder / "config.json").exists():
        if folder.is_file():
            raise UserError(f"{folder} is a file; give a model folder.")
        if looks_like_repository(str(path_or_repo)):
            folder = repository(str(path_or_repo))
        elif not folder.exists():
            what_to_do = missing_advice(folder, "give a folder or a Hugging Face repository")
            raise UserError(f"There is no model folder {folder}; {what_to_do}.")
    if not (folder / "config.json").exists():
        raise UserError(f"{folder} has no config.json; copy the complete model folder again.")
    config = read_json(folder / "config.json")
    check_supported(config)  # before gigabytes are read
    check_no_code(folder, config)
    weight_files(folder)
    return folder


def fetched(name: str) -> Path:
    """The folder of a model that `m2r2kit fetch` downloads.

    Raises:
        UserError: it is not downloaded yet.
    """
    folder = _fetched_folder(name)
    if not (folder / "config.json").exists():
        raise UserError(f"The model {name} is not downloaded yet; run `m2r2kit fetch {name}` once (93 MB).")
    return folder


def _fetched_folder(name: str) -> Path:
    return cache_dir() / "models" / name


def weight_files(folder: Path) -> list[Path]:
    """The files of a model's weights: those in its index, or all model*.safetensors without one.

    Raises:
        UserError: a file is missing, or it is unclear which files belong to the model.
    """
    index = folder / INDEX
    if index.exists():
        named = read_json(index).get("weight_map")
        names = set(map(str, named.values())) if isinstance(named, dict) else set()
        if not names or any(Path(name).name != name for name in names):
            raise UserError(f"{index} lists no weights; copy the complete model folder again.")
        files = [folder / name for name in sorted(names)]
        if missing := [file.name for file in files if not file.exists()]:
            raise UserError(f"{folder} lacks {missing[0]}; copy the complete model folder again.")
        return files
    files = sorted(folder.glob("model*.safetensors"))
    if not files:
        raise UserError(f"{folder} has no model*.safetensors; copy the complete model folder again.")
    if len(files) > 1 and folder / "model.safetensors" in files:
        other = next(file.name for file in files if file.name != "model.safetensors")
        raise UserError(
            f"{folder} has model.safetensors, {other} and no index that lists the model's files; "
            "remove those that are not the model's."
        )
    return files


def trained_folder(model: str | Path, kind: str) -> Path:
    """The default folder of modules trained for a model.

    It is inside the folder of the model or adapter. For a repository it is in the cache folder, because a
    folder of the repository's name in the working directory would be taken for the model.

    Args:
        kind: `stream`, `drafters`, `exits` or `predictors`.
    """
    folder = _fetched_folder(str(model)) if str(model) in FETCHED else Path(model)
    if any((folder / name).exists() for name in ("config.json", ADAPTER[0])):
        return folder / kind
    if looks_like_repository(str(model)):
        return cache_dir() / "trained" / str(model).replace("/", "--") / kind
    return folder / kind


def check_no_code(folder: Path, config: dict) -> None:
    """Refuse a model that needs custom code.

    Such code is never run: transformers is told not to trust it, and chat templates run in a sandbox.

    Raises:
        UserError: the model or its tokenizer needs custom code.
    """
    if config.get("model_file"):
        raise UserError(f"{folder} needs custom code ({config['model_file']}), which is not run here.")
    classes, auto_map = FAMILIES[config["model_type"]].classes, config.get("auto_map")
    for name, wanted in (("AutoConfig", "Config"), ("AutoModelForCausalLM", "ForCausalLM")):
        code = auto_map.get(name) if isinstance(auto_map, dict) else None
        if code and str(code).rsplit(".", 1)[-1] != classes + wanted:  # mlx-lm has the family's class
            raise UserError(f"{folder} needs custom code ({code}), which is not run here.")
    file = folder / "tokenizer_config.json"
    settings = read_json(file) if file.exists() else {}
    for code in (settings.get("auto_map"), auto_map):
        code = code.get("AutoTokenizer") if isinstance(code, dict) else code
        code = next((str(each) for each in code if each), None) if isinstance(code, list) else code
        if code:
            raise UserError(f"The tokenizer of {folder} needs custom code ({code}), which is not run here.")


def read_config(folder: Path) -> dict:
    """A folder's config.json, with `tie_word_embeddings`.

    If the key is missing, mlx-lm and transformers have different defaults; the weights decide here.
    """
    config = read_json(folder / "config.json")
    if "tie_word_embeddings" not in config:
        names = tensor_names(folder)
        config["tie_word_embeddings"] = not any(name.startswith("lm_head.") for name in names)
    return config


def tensor_names(folder: Path) -> dict[str, Path]:
    """The file of each tensor of a model, from the headers of its files.

    Raises:
        UserError: a header is damaged, or a tensor is in two files.
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
            raise UserError(f"{name} is in {found[name].name} and in {file.name}; remove the unused file.")
        found |= dict.fromkeys(names, file)
    return found


def read_json(path: Path) -> dict:
    """The object in a JSON file of a model.

    Raises:
        UserError: the file is missing or cannot be read, or is not a JSON object.
    """
    try:
        value = parse_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"There is no {path}; copy the complete model folder again.") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}.") from error
    except ValueError:  # not JSON, or not text
        value = None
    if not isinstance(value, dict):
        raise UserError(f"{path} is not valid JSON; copy the complete model folder again.")
    return value
