"""`stagewright schema`: the JSON Schema of a document."""

from __future__ import annotations

from typing import Annotated

import typer

from stagewright.cli.output import Json, print_document
from stagewright.planner.errors import InvalidArgument


def schema(
    document: Annotated[str, typer.Argument(help="plan, profile, cluster, job or request.")],
    json: Json = False,
) -> None:
    """Print the JSON Schema of a document, for editors and validators.

    Example: stagewright schema plan > plan.schema.json
    """
    from stagewright.planner.documents import Cluster, ModelProfile, Plan, TrainingJob
    from stagewright.planner.documents.request import PlanRequest

    documents = {model.document_name: model for model in (Plan, ModelProfile, Cluster, TrainingJob, PlanRequest)}
    if document not in documents:
        raise InvalidArgument(
            f"there is no document {document!r}", field="document", hint="one of " + ", ".join(documents)
        )
    print_document(documents[document].model_json_schema())
