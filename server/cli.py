"""The commands of ``run.py``.

Each command imports its own modules: a worker does not need the server process, ``--help`` needs neither, and starts
are frequent.
"""

import argparse
import asyncio
import gc
import sys
from collections.abc import Callable

from server import logs, settings, shutdown
from server.child import open_standard_streams
from server.settings import StartError

MAX_PROCESSES = 256


def main() -> None:
    open_standard_streams()
    arguments = _parser().parse_args()
    try:
        sys.exit(arguments.run(arguments))
    except StartError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


def serve(arguments: argparse.Namespace) -> int:
    loaded = settings.load()
    logs.configure(loaded)
    if arguments.listener is None:  # else the supervisor has checked
        _require_migrated_database(loaded.database_url)
    if arguments.processes is not None:
        from server.supervisor import supervise

        address = (loaded.host, loaded.port)
        stop_timeout = shutdown.server_stop_timeout(loaded)
        return asyncio.run(
            supervise(["server"], processes=arguments.processes, stop_timeout=stop_timeout, address=address)
        )
    gc.disable()  # during imports, which leave no garbage: collections would take a tenth of the start
    from server import app

    app.run(loaded, listener=arguments.listener, ready=arguments.ready)
    return 0


def work(arguments: argparse.Namespace) -> int:
    loaded = settings.load()
    logs.configure(loaded)
    if arguments.processes is not None:
        from server.supervisor import supervise

        command = ["worker", "--queues", ",".join(arguments.queues)]
        return asyncio.run(
            supervise(command, processes=arguments.processes, stop_timeout=shutdown.worker_stop_timeout())
        )
    gc.disable()  # as above
    from server import worker

    return worker.run(loaded, arguments.queues, supervised=arguments.supervised, ready=arguments.ready)


def develop(_: argparse.Namespace) -> int:
    from server.devstack import dev

    asyncio.run(dev.run(settings.load_stack()))
    return 0


def migrate(arguments: argparse.Namespace) -> int:
    from server import backfill, migrations

    url = settings.load().database_url
    if arguments.check:
        pending = migrations.pending(url)
        print("\n".join(f"pending: {name}" for name in pending) or "no pending migrations")
        return 1 if pending else 0
    print("\n".join(f"applied: {name}" for name in migrations.apply(url)) or "no migrations to apply")
    for line in asyncio.run(backfill.run(url)):
        print(line)
    return 0


def print_openapi(_: argparse.Namespace) -> int:
    from server import app, json

    sys.stdout.buffer.write(json.dumps(app.swagger_document()) + b"\n")
    return 0


def print_asyncapi(_: argparse.Namespace) -> int:
    from server import app, json

    sys.stdout.buffer.write(json.dumps(app.asyncapi_document()) + b"\n")
    return 0


def _require_migrated_database(url: str) -> None:
    from server import migrations

    pending = migrations.pending(url)
    if pending:
        raise StartError(f"{len(pending)} migrations are pending; run: python run.py migrate")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="run.py", description="Collaborative Workspace Backend")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    server = _command(commands, serve, "server", "serve REST and WebSockets on HOST:PORT")
    _add_process_options(server)
    server.add_argument("--listener", type=int, help=argparse.SUPPRESS)  # an open socket, from the supervisor
    worker = _command(commands, work, "worker", "run queued jobs")
    worker.add_argument(
        "--queues", type=_queues, default="high,normal,low", metavar="LIST", help="default: %(default)s"
    )
    _add_process_options(worker)
    _command(commands, develop, "dev", "run embedded stores, migrations, one server and one worker")
    check = _command(commands, migrate, "migrate", "apply the pending migrations of sql/migrations")
    check.add_argument("--check", action="store_true", help="list pending migrations; exit 1 if there are any")
    _command(commands, print_openapi, "openapi", "print the OpenAPI document")
    _command(commands, print_asyncapi, "asyncapi", "print the AsyncAPI document of the socket")
    return parser


def _add_process_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--processes", type=_process_count, metavar="N", help="number of supervised processes")
    # With --supervised, SIGHUP means that a successor is ready.
    command.add_argument("--supervised", action="store_true", help=argparse.SUPPRESS)
    command.add_argument("--ready", type=int, help=argparse.SUPPRESS)  # a pipe, from the supervisor


def _process_count(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= MAX_PROCESSES:
        raise argparse.ArgumentTypeError(f"must be a number from 1 to {MAX_PROCESSES}")
    return int(text)


def _queues(text: str) -> tuple[str, ...]:
    from server.jobs.queue import PRIORITY_CLASSES

    names = {part.strip() for part in text.split(",")}
    if not names <= set(PRIORITY_CLASSES):
        raise argparse.ArgumentTypeError(f"choose from {', '.join(PRIORITY_CLASSES)}")
    return tuple(name for name in PRIORITY_CLASSES if name in names)  # by priority, not in the order of the argument


def _command(
    commands: "argparse._SubParsersAction[argparse.ArgumentParser]",
    run: Callable[[argparse.Namespace], int],
    name: str,
    summary: str,
) -> argparse.ArgumentParser:
    epilog = "Settings come from the environment; .env.example lists them all."
    command = commands.add_parser(name, help=summary, description=summary, epilog=epilog)
    command.set_defaults(run=run)
    return command
