"""The entry point: finds the command, runs it, and turns errors into messages, JSON and exit codes.

Only the module of the command that was asked for is imported, so that `plan --help` answers at once.
"""

from __future__ import annotations

import difflib
import importlib
import logging
import os
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass

import typer

from stagewright import __version__
from stagewright.cli.output import print_document
from stagewright.planner.errors import InvalidArgument, StagewrightError

INTERRUPTED = 130
USAGE = 2
INTERNAL = 1


@dataclass(frozen=True)
class Command:
    """A command's module and one line of help; the module offers `app` (a group) or a function of the command's name."""

    module: str
    summary: str


COMMANDS: dict[str, Command] = {
    "demo": Command(
        "demo", "Profile, plan and run the example model on this machine, and show prediction and measurement."
    ),
    "profile": Command("profile", "Measure a model's layers, or the network."),
    "cluster": Command("cluster", "Discover, show or check a cluster."),
    "catalog": Command("catalog", "List known devices, models and clusters."),
    "plan": Command("plan", "Find the best parallel training plan, with a proven bound."),
    "explain": Command("explain", "Say what binds a plan, what came behind it, and why not another choice."),
    "templates": Command("templates", "Plan a pipeline for every node count, ready for every loss of nodes."),
    "rent": Command("rent", "Choose how many nodes of each zone to rent, for most tokens a dollar."),
    "phases": Command("phases", "Plan the phases of a round together, changes of layout included."),
    "sequences": Command("sequences", "Group devices for sequences of different length."),
    "hetpipe": Command("hetpipe", "Cut a model over virtual workers of mixed GPUs."),
    "simulate": Command("simulate", "Simulate a plan again."),
    "validate": Command("validate", "Check a plan against a cluster."),
    "export": Command("export", "Write a plan in the files of another framework."),
    "compare": Command("compare", "Put plans or planners side by side under the common simulator."),
    "run": Command("run", "Run a plan with torch and compare prediction and measurement."),
    "schedule": Command("schedule", "Generate, simulate and draw a pipeline schedule."),
    "cost": Command("cost", "Fit the cost model to measured runs."),
    "systems": Command("systems", "List every published system, whether it works here, and how."),
    "serve": Command("serve", "Start the REST service and its playground."),
    "keys": Command("keys", "Make, revoke and list the keys of the service."),
    "db": Command("db", "Bring the service's tables to this version."),
    "schema": Command("schema", "Print the JSON Schema of a document."),
    "env": Command("env", "Print versions and devices, for bug reports."),
}


def main() -> None:
    """Run the command line and exit."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: Sequence[str]) -> int:
    """Run one command and return its exit code; errors are printed, as JSON when `--json` is among the arguments."""
    as_json = "--json" in arguments
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    try:
        result = build(arguments)(args=list(arguments), prog_name="stagewright", standalone_mode=False)
        return result if isinstance(result, int) else 0
    except StagewrightError as error:
        return _fail(error.to_json(), error.exit_code, as_json=as_json)
    except typer.TyperException as error:
        hint = f"see `stagewright {_command_name(arguments) or ''} --help`".replace("  ", " ")
        document = {"kind": "usage", "message": error.format_message(), "field": None, "hint": hint}
        return _fail(document, USAGE, as_json=as_json)
    except (KeyboardInterrupt, typer.Abort):
        return _fail(
            {"kind": "interrupted", "message": "interrupted", "field": None, "hint": None}, INTERRUPTED, as_json=as_json
        )
    except BrokenPipeError:
        sys.stdout = open(os.devnull, "w")  # noqa: PTH123, SIM115
        return INTERNAL
    except Exception as error:
        sys.stderr.write(traceback.format_exc())
        document = {
            "kind": "internal",
            "message": f"{type(error).__name__}: {error}",
            "field": None,
            "hint": "this is a defect of Stagewright; please report it with the lines above and `stagewright env --json`",
        }
        return _fail(document, INTERNAL, as_json=as_json)


def build(arguments: Sequence[str]) -> typer.Typer:
    """Return the application with the command that `arguments` ask for, or with all of them for help.

    Raises InvalidArgument for an unknown command, with the nearest one.
    """
    app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False, no_args_is_help=True)

    @app.callback(invoke_without_command=True)
    def root(
        version: bool = typer.Option(False, "--version", help="Print the version.", is_eager=True),
        json: bool = typer.Option(False, "--json", help="With --version: print it as JSON.", hidden=True),
    ) -> None:
        """Stagewright measures a model, solves for its parallel training plan with a proof, and runs the plan."""
        if version:
            if json:
                print_document({"version": __version__})
            else:
                sys.stdout.write(f"stagewright {__version__}\n")
            raise typer.Exit

    name = _command_name(arguments)
    if name is not None and name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean `stagewright {near[0]}`?" if near else "see `stagewright --help`"
        raise InvalidArgument(f"there is no command {name!r}", field="command", hint=hint)
    for command_name in COMMANDS if name is None else (name,):
        _register(app, command_name)
    return app


def _register(app: typer.Typer, name: str) -> None:
    command = COMMANDS[name]
    try:
        module = importlib.import_module(f"stagewright.cli.{command.module}")
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("stagewright"):
            raise
        raise InvalidArgument(
            f"`stagewright {name}` needs the package {error.name!r}",
            field="command",
            hint="install the extra that holds it: pip install 'stagewright[serve]' or 'stagewright[torch]'",
        ) from error
    if hasattr(module, "app"):
        app.add_typer(module.app, name=name, help=command.summary)
    else:
        app.command(name, short_help=command.summary)(getattr(module, name))


def _command_name(arguments: Sequence[str]) -> str | None:
    return next((argument for argument in arguments if not argument.startswith("-")), None)


def _fail(document: dict[str, str | None], exit_code: int, *, as_json: bool) -> int:
    if as_json:
        print_document({"error": document})
    sys.stderr.write(f"error: {document['message']}\n")
    if document["hint"]:
        sys.stderr.write(f"hint: {document['hint']}\n")
    return exit_code
