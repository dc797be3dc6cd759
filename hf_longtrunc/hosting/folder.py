"""A model folder that every host of transformers generates with under a technique, and the check of one."""

from __future__ import annotations

import ast
import hashlib
import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from hf_longtrunc import __version__
from hf_longtrunc.arguments import check_choice
from hf_longtrunc.evaluation import update_model_card
from hf_longtrunc.hosting.generate import reading_of
from hf_longtrunc.hosting.settings import HostSettings
from hf_longtrunc.pretrained import checked_name, default_model_folder

if TYPE_CHECKING:
    import os

CODE = Path("custom_generate", "generate.py")
_WEIGHTS = {".safetensors", ".bin", ".gguf", ".pt", ".pth"}
_RUNS_CODE = ("auto_map", "custom_pipelines")  # of a json: names of code that trust_remote_code lets transformers run
_TEMPLATE = '''"""`generate` under a technique of the package hf_longtrunc; the model and its weights are unchanged.

Hosts of transformers run this file with trust_remote_code=True: `generate(custom_generate=FOLDER)`, `from_pretrained`,
`pipeline`, `transformers serve`. Without trust_remote_code the model generates as it always did.
`hf-longtrunc verify FOLDER` checks that hf_longtrunc wrote this file, and that the folder holds no other code.
"""

try:
    from hf_longtrunc.hosting import hosted_generate
except ImportError as error:
    raise ImportError(
        "this folder generates through the Python package hf_longtrunc, which is missing here or too old: install it "
        "in the environment of this host, or load the folder without trust_remote_code for the unmodified model"
    ) from error

# Read as JSON and checked; the README says what it means.
SETTINGS = """
%s
"""


def generate(inputs=None, *args, model, **kwargs):
    """Generate as `model.generate(inputs, ...)` does, under SETTINGS."""
    return hosted_generate(SETTINGS, model, inputs, *args, **kwargs)
'''
_CARD = """## In a host of transformers

Exported by hf_longtrunc {version}. `custom_generate/generate.py` is the only code here; config, tokenizer and weights
are those of {source}. Its settings:

```json
{settings}
```

{sees} A host runs it where it is told to trust this folder's code:

```bash
transformers serve FOLDER --trust-remote-code
lm_eval --model hf --model_args pretrained=FOLDER,trust_remote_code=True,max_length=1000000 --tasks ...
```

```python
model = AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)
pipe = pipeline("text-generation", model=FOLDER, trust_remote_code=True)
other_model.generate(input_ids, custom_generate=FOLDER, trust_remote_code=True)
```

`model.generate` alone is changed: a forward by hand, log-likelihoods of lm_eval and continuous batching run the model
as it is. To undo it, load the folder without `trust_remote_code`, or delete `custom_generate`.
`hf-longtrunc verify FOLDER` checks the code; its SHA-256 is `{sha256}`.
"""


@dataclass(frozen=True)
class Exported:
    """A folder that `export` made: where it lies, its settings, and the SHA-256 of its code in hexadecimal."""

    folder: Path
    settings: HostSettings
    sha256: str


def export(
    model: str | os.PathLike[str] | None,
    folder: str | os.PathLike[str],
    technique: Any,
    *,
    sampler: str | None = None,
    weights: str = "link",
    cache_bytes: int = 2**30,
    finder: str | None = None,
) -> Exported:
    """Write a model folder that every host of transformers generates with under a technique.

    `generate(custom_generate=folder)`, `from_pretrained(folder)`, `pipeline(model=folder)`, `transformers serve folder`
    and lm_eval run it with `trust_remote_code=True`; `hosted_generate` says what happens there. Nothing is loaded.

    Args:
        model: a hub id or a folder of a causal language model that brings no code of its own; None takes
            SmolLM2-135M-Instruct, as `load_pretrained` does.
        folder: to be made; it must not exist, or be empty.
        technique: `LMInfinite(...)` or `DualChunkAttention(...)`.
        sampler: "eta=0.002", "epsilon=0.0009", "top-n-sigma=1" or "p-less": the folder then samples by default, from
            the model's whole distribution as far as the sampler keeps it. None leaves decoding as the model has it.
        weights: "link" them where they lie, "copy" them, or "none": code alone, for
            `generate(custom_generate=folder)` on a model that is loaded from elsewhere.
        cache_bytes: of the caches that are kept between requests; 0 keeps none.
        finder: "encoder" or "bm25": a chat longer than the window is answered from the passage that its last question
            points at, see `HostSettings`.

    Raises:
        FileExistsError: `folder` holds something.
        TypeError, ValueError: an argument that cannot be, or a model that is no causal one or runs code of its own.

    Examples:
        >>> made = export(model_folder, f"{scratch}/endless", LMInfinite(window_length=64))
        >>> sorted(path.name for path in made.folder.iterdir())
        ['README.md', 'config.json', 'custom_generate', 'generation_config.json', 'model.safetensors']
    """
    check_choice("weights", weights, ("link", "copy", "none"))
    out = Path(folder)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"{out} exists and is not empty: name another folder, or delete it first")
    source = default_model_folder() if model is None else _source(model)
    technique = _with_window(technique, source)
    settings = HostSettings(technique=technique, sampler=sampler, cache_bytes=cache_bytes, finder=finder)
    out.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as scratch:
        made = Path(scratch, "made")
        made.mkdir()
        if weights != "none":
            _place(source, made, weights == "link")
        if settings.sampler is not None and weights != "none":
            _sample_by_default(made / "generation_config.json")
        (made / CODE).parent.mkdir()
        (made / CODE).write_text(_code(settings), encoding="utf-8")
        _write_card(made, settings, source if model is None else model)
        if out.exists():
            out.rmdir()
        made.rename(out)
    return verify_export(out)


def verify_export(folder: str | os.PathLike[str]) -> Exported:
    """Check that the code in a folder is what `export` writes for the settings in it, and all the code there is.

    Executes nothing. Weights are not checked.

    Raises:
        FileNotFoundError: the folder was not exported.
        ValueError: its code was changed, it holds other code, or its settings cannot be read.

    Examples:
        >>> made = export(model_folder, f"{scratch}/checked", LMInfinite(window_length=64))
        >>> verify_export(made.folder) == made
        True
    """
    path = Path(folder, CODE)
    if not path.is_file():
        raise FileNotFoundError(f"{folder} is no exported folder: {CODE} is missing")
    content = path.read_bytes()
    others = sorted(str(each.relative_to(folder)) for each in Path(folder).rglob("*.py") if each != path)
    if others:
        raise ValueError(f"{folder} holds other code: {', '.join(others)}; delete it, or export the folder again")
    _refuse_own_code(Path(folder))
    settings = HostSettings.from_json(_settings_in(content.decode("utf-8", "replace"), path))
    if content != _code(settings).encode():
        raise ValueError(
            f"{path} is not what this version of hf_longtrunc writes: it was changed, or written by another version; "
            "read it before you trust it, or export the folder again"
        )
    return Exported(Path(folder), settings, hashlib.sha256(content).hexdigest())


def _code(settings: HostSettings) -> str:
    return _TEMPLATE % settings.to_json()


def _settings_in(code: str, path: Path) -> str:
    """Return the JSON in an exported file, which is parsed and not run."""
    try:
        for statement in ast.parse(code).body:
            if isinstance(statement, ast.Assign) and [ast.unparse(each) for each in statement.targets] == ["SETTINGS"]:
                return str(ast.literal_eval(statement.value))
    except (SyntaxError, ValueError) as error:
        raise ValueError(f"{path} is no code that hf_longtrunc wrote: {error}") from error
    raise ValueError(f"{path} is no code that hf_longtrunc wrote: it has no SETTINGS")


def _source(model: str | os.PathLike[str]) -> Path:
    """Return the model's folder, fetched from the hub where it is none here."""
    if Path(checked_name(model)).is_dir():
        return Path(model)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(model)))
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"model {model!r} could not be fetched from the hub, and is no folder: {error}"
        ) from error


def _with_window(technique: Any, source: Path) -> Any:
    """Check the model's config, and return the technique with the window that it implies."""
    from transformers import AutoConfig

    _refuse_own_code(source)
    config: Any = AutoConfig.from_pretrained(source)
    if config.is_encoder_decoder:
        raise ValueError(f"model must be a causal language model, and {source} is an encoder-decoder")
    if not isinstance(technique, type) and getattr(technique, "window_length", 1) is None:
        return replace(technique, window_length=technique.for_model(SimpleNamespace(config=config)).window_length)
    return technique


def _refuse_own_code(folder: Path) -> None:
    """Raise ValueError where trust_remote_code would run code of the model's own."""
    for path in sorted(folder.glob("*.json")):
        described = json.loads(path.read_text(encoding="utf-8"))
        for name in _RUNS_CODE:
            if isinstance(described, dict) and described.get(name):
                raise ValueError(
                    f"{path} names code of the model's own ({name}), which trust_remote_code would run too: export a "
                    "model of an architecture that transformers has"
                )


def _place(source: Path, made: Path, is_linked: bool) -> None:
    """Copy a model's files, its weights as links if so wished."""
    if (source / CODE).exists():
        raise ValueError(f"{source} was exported already: export the model that it was made from")
    for path in sorted(source.iterdir()):
        if path.is_dir() or path.name.startswith("."):
            continue
        if path.suffix == ".py":
            raise ValueError(f"{path} is code of the model's own, which an exported folder does not take")
        if is_linked and path.suffix in _WEIGHTS:
            (made / path.name).symlink_to(path.resolve())
        else:
            shutil.copyfile(path, made / path.name)


def _sample_by_default(path: Path) -> None:
    described = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    described |= {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
    path.write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")


def _write_card(made: Path, settings: HostSettings, source: str | os.PathLike[str]) -> None:
    card = made / "README.md"
    before = card.read_text(encoding="utf-8").rstrip() if card.exists() else f"# {made.name}"
    technique = settings.technique
    reading = reading_of(technique, 0)
    if reading.window is None:
        sees = "The model sees the whole text, at the price of a cache that grows with it."
    else:
        sees = f"The model sees the first {technique.num_sink_tokens} and the last {reading.window:,} tokens of a text"
        is_searched = settings.finder is not None or getattr(technique, "retrieval", None) is not None
        sees += ", and of the rest what a question asks for." if is_searched else " and forgets the rest."
    section = _CARD.format(
        version=__version__,
        source=Path(source).name if Path(source).is_dir() else str(source),
        settings=settings.to_json(),
        sees=sees,
        sha256=hashlib.sha256(_code(settings).encode()).hexdigest(),
    )
    card.write_text(f"{before}\n\n{section}", encoding="utf-8")
    update_model_card(made, [technique, *settings.processors()])
