"""`python -m infra.local up|down|status`: the local stack on the command line."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from rich.console import Console

from infra.local.stack import LocalStack, StackError, shown

_DEFAULT = Path(__file__).resolve().parents[2] / ".stack"


def main(argv: list[str] | None = None) -> int:
    """Run; gives 0, 1 where the stack is down, 2 where it cannot be started or stopped."""
    parser = argparse.ArgumentParser(prog="python -m infra.local", description=__doc__)
    parser.add_argument("verb", choices=("up", "down", "status"))
    parser.add_argument("--folder", type=Path, default=_DEFAULT, help="state and logs")
    parser.add_argument("--workers", type=int, default=2, help="raylets beside the head's")
    parser.add_argument("--cpus", type=int, default=2, help="that each raylet says it has")
    parser.add_argument("--json", action="store_true", help="the status as one JSON document")
    options = parser.parse_args(argv)
    screen = Console(stderr=True, soft_wrap=True, highlight=False)
    stack = LocalStack(options.folder, workers=options.workers, cpus=options.cpus)
    try:
        if options.verb == "down":
            screen.print(f"stack: {'ended' if stack.down() else 'was not up'}")
            return 0
        if options.verb == "up":
            with screen.status("stack: starting S3, PostgreSQL, MLflow, Ray"):
                started = stack.up()
            screen.print(f"stack: {'up' if started else 'is up already'}")
    except StackError as error:
        screen.print(f"stack: {error}")
        return 2
    parts = stack.status()
    if options.json:
        print(json.dumps(parts, indent=2))
    else:
        for name, part in parts.items():
            state = f"pid {part['pid']}" if part["running"] else "ENDED"
            screen.print(f"{name:<14} {state:<12} {part['address'] or ''}")
        if parts:
            for name, value in stack.environment.items():
                screen.print(f"  {name}={shown(name, value)}", style="dim")
            screen.print(f"to use it: . {stack.folder / 'env'}")
        else:
            screen.print("stack: is down")
    return 0 if parts and all(part["running"] for part in parts.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
