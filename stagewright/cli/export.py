"""`stagewright export`: a plan in the files that another framework reads."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from stagewright.cli.output import Json, console, print_document


def export(
    plan: Annotated[Path, typer.Argument(metavar="PLAN", help="A plan document.")],
    to: Annotated[
        str, typer.Option(help="The format: megatron-args, deepspeed, torchtitan, torch-csv, chrome-trace, svg, html.")
    ],
    out: Annotated[Path, typer.Option(help="The folder to write into; made when it is not there.")],
    profile: Annotated[
        Path | None, typer.Option(help="Its profile; profile.json beside it or the catalogue's unless told.")
    ] = None,
    strict: Annotated[bool, typer.Option(help="Exit 5 and write nothing unless every field is exact.")] = False,
    json: Json = False,
) -> None:
    """Write a plan for another framework, and say what its format cannot hold.

    Example: stagewright export plan.json --to megatron-args --out launch
    """
    from stagewright.cli.simulate import find_profile
    from stagewright.formats.exporters import exporter
    from stagewright.planner.documents import ModelProfile, Plan
    from stagewright.planner.documents.document import write_text
    from stagewright.planner.errors import InvalidArgument, NotExpressible

    write = exporter(to)
    document = Plan.load(plan)
    model = ModelProfile.load(profile) if profile is not None else find_profile(document, plan)
    document.check_profile(layer_digest=model.layer_digest, num_layers=model.num_layers)
    exported = write(document, model)
    worse = [loss for loss in exported.losses if loss.status != "exact"]
    if strict and worse:
        raise NotExpressible(
            f"{to} holds {worse[0].field} {worse[0].status}: {worse[0].note}",
            field=worse[0].field,
            hint="leave out --strict to write it all the same",
        )
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InvalidArgument(
            f"cannot make {out}: {error.strerror}", field="out", hint="name another folder"
        ) from error
    files = [out / name for name in exported.files]
    for path, content in zip(files, exported.files.values(), strict=True):
        write_text(path, content)
    if json:
        print_document({"files": [str(path) for path in files], "losses": [asdict(loss) for loss in exported.losses]})
        return
    for path in files:
        console().print(f"wrote {path}")
    for loss in worse:
        console().print(f"{loss.status}: {loss.field}: {loss.note}")
