"""`hf-longtrunc match`: the parameters at which truncation samplers refuse the same share of a text."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from typer import Argument, Option

from hf_longtrunc.cli import common


def match(
    file: Annotated[str | None, Argument(help="A human text, or - for standard input.")] = None,
    string: Annotated[str | None, Option(help="The text itself, instead of a file.")] = None,
    model: common.Model = None,
    dtype: common.DType = None,
    device: common.Device = None,
    rank: Annotated[int, Option(min=1, help="Directions of the softmax basis.")] = 20,
    max_tokens: Annotated[int, Option(min=2, help="Tokens of the text that are read.")] = 2048,
    bat_tokens: Annotated[int, Option(min=0, help="Tokens that basis-aware truncation reads; 0 leaves it out.")] = 256,
    picture: Annotated[Path, Option(help="File for the plot.")] = Path("longtrunc_match.png"),
    force: common.Force = False,
    as_json: common.AsJson = False,
) -> None:
    """Find the parameters at which truncation samplers, ours and transformers', refuse the same share of a text."""
    if (file is None) == (string is None):
        raise typer.BadParameter("name a file, or give the text itself by --string", param_hint="FILE")
    if picture.suffix not in (".png", ".svg", ".pdf"):
        raise typer.BadParameter(f"expected a .png, .svg or .pdf file, got {picture}", param_hint="--picture")
    common.check_outputs(picture.parent, picture.name, force=force, option="--picture")
    text = string if file is None else common.read_text(file)
    from hf_longtrunc import SoftmaxBasis
    from hf_longtrunc.evaluation import critical_parameters, match_table, matched_parameters, plot_match
    from hf_longtrunc.evaluation.matching import known_shares, refused_shares

    loaded, tokenizer = common.load(model, dtype, device, needs="a causal LM")
    ids: Any = tokenizer(text, return_tensors="pt", verbose=False)["input_ids"]
    ids = ids[0, :max_tokens]
    tokens = len(ids) - 1
    known_shares(tokens)
    basis = SoftmaxBasis.from_model(loaded, rank) if bat_tokens else None
    critical = critical_parameters(loaded, ids, basis, bat_tokens=bat_tokens or 1, progress=common.is_watched())
    common.save_picture(plot_match(critical), picture)
    if as_json:
        settings = {"tokens": tokens, "bat_tokens": len(critical.get("BAT on eta", [])), "rank": rank}
        common.print_json(settings | {"parameters": matched_parameters(critical), "refused": refused_shares(critical)})
    else:
        common.results().print(match_table(critical))
        common.results().print(
            f"{tokens} tokens, rank {rank}; shares below 1 / tokens = {1 / tokens:.1%} have no parameter"
        )
