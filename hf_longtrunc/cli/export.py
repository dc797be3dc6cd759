"""`hf-longtrunc export`, `verify` and `serve`: a folder that every host of transformers loads."""

from __future__ import annotations

from pathlib import Path  # noqa: TC003 (typer reads the annotations when it runs)
from typing import Annotated, Any, Literal

import typer
from rich.markup import escape
from typer import Argument, Option

from hf_longtrunc.cli import common


def export(
    model: Annotated[str, Argument(help="Hub id or folder of a causal LM; 'default' is SmolLM2-135M-Instruct.")],
    folder: Annotated[Path, Argument(help="The folder to make.")],
    technique: Annotated[
        Literal["lm-infinite", "streaming-llm", "dual-chunk"],
        Option(help="First tokens and last window at constant memory, or the whole text at growing memory."),
    ] = "lm-infinite",
    window: common.Window = None,
    sinks: Annotated[int, Option(min=0, help="LM-Infinite's first tokens that stay visible.")] = 16,
    retrieval: Annotated[
        Literal["for-chat", "passages"] | None,
        Option(help="for-chat: also attend to blocks that a question points at; passages: find, and read those."),
    ] = None,
    finder: Annotated[
        Literal["encoder", "bm25"] | None, Option(help="Find passages by meaning (the default) or by words.")
    ] = None,
    sampler: Annotated[str | None, Option(help="Sample by eta=0.002, p-less or another sampler.")] = None,
    weights: Annotated[
        Literal["link", "copy", "none"], Option(help="Link or copy the weights, or write the code alone.")
    ] = "link",
    cache_mib: Annotated[int, Option(min=0, help="MiB of conversations kept between requests; 0: none.")] = 1024,
) -> None:
    """Make a model folder that every host loads: transformers serve, pipeline, lm_eval, from_pretrained."""
    from hf_longtrunc import DualChunkAttention, LMInfinite, StreamingLLM, TopBlocks
    from hf_longtrunc.hosting import export as export_folder
    from hf_longtrunc.pretrained import default_encoder_folder, default_model_folder

    source = str(default_model_folder()) if model == "default" else model
    kinds: dict[str, Any] = {"lm-infinite": LMInfinite, "streaming-llm": StreamingLLM, "dual-chunk": DualChunkAttention}
    options: dict[str, Any] = {"num_sink_tokens": sinks, "window_length": window}
    if technique == "dual-chunk":
        options = {}
        if window is not None:
            raise typer.BadParameter("goes with --technique lm-infinite or streaming-llm", param_hint="--window")
    if finder is not None and retrieval != "passages":
        raise typer.BadParameter("goes with --retrieval passages", param_hint="--finder")
    refused = {"passages": "dual-chunk", "for-chat": "streaming-llm"}
    if retrieval is not None and technique == refused[retrieval]:
        raise typer.BadParameter(f"{retrieval} does not go with --technique {technique}", param_hint="--retrieval")
    if retrieval == "for-chat":
        options["retrieval"] = TopBlocks.for_chat(common.load_tokenizer(source))
    elif retrieval == "passages":
        finder = finder or "encoder"
        if finder == "encoder":
            default_encoder_folder()  # fetched now, not within the first request
    chosen = kinds[technique](**options)
    made = export_folder(
        source, folder, chosen, sampler=sampler, weights=weights, cache_bytes=cache_mib * 2**20, finder=finder
    )
    common.results().print(f"{escape(str(made.folder))}: sha256 {made.sha256}")
    generate = f"model.generate(ids, custom_generate={str(made.folder)!r}, trust_remote_code=True)"
    common.notes().print("next:", generate if weights == "none" else f"hf-longtrunc serve {made.folder}", markup=False)


def verify(
    folder: Annotated[Path, Argument(help="A folder that `hf-longtrunc export` made.")],
    sha256: Annotated[str | None, Option(help="What export printed; another hash is an error.")] = None,
    as_json: common.AsJson = False,
) -> None:
    """Check the code in an exported folder before a host is told to trust it; nothing of it is run."""
    from hf_longtrunc.hosting import verify_export

    found = verify_export(folder)
    if sha256 is not None and sha256.lower() != found.sha256:
        raise ValueError(
            f"{folder} has code with SHA-256 {found.sha256}, expected {sha256}: other settings, or another"
        )
    if as_json:
        common.print_json({"sha256": found.sha256, "technique": repr(found.settings.technique)})
    else:
        common.results().print(f"{found.sha256}: the code that hf_longtrunc writes for {found.settings.technique}")


def serve(
    folder: Annotated[Path, Argument(help="A folder that `hf-longtrunc export` made.")],
    host: Annotated[str, Option(help="Address to listen at.")] = "localhost",
    port: Annotated[int, Option(help="Port to listen at.")] = 8000,
    device: Annotated[str, Option(help="Such as cpu or cuda:0.")] = "auto",
    dtype: Annotated[str, Option(help="The weights' type; auto is what they are saved in.")] = "auto",
) -> None:
    """Verify an exported folder and run `transformers serve` on it; answers count tokens read, kept and forgotten."""
    from hf_longtrunc.extras import missing
    from hf_longtrunc.hosting import serve as serve_folder

    try:
        serve_folder(folder, host=host, port=port, device=device, dtype=dtype)
    except ModuleNotFoundError as error:
        if "pip install" in str(error):  # a finder's, which names its own extra
            raise
        raise missing("serve", error.name, "serve") from error
