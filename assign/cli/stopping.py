"""Say how to continue after Ctrl-C. It imports nothing of the package: it may run during imports."""

from collections.abc import Sequence


def advice(arguments: Sequence[str]) -> str:
    """Return how to continue after the command with these arguments was stopped."""
    command = next((each for each in arguments if not each.startswith("-")), "")
    options = {name: _value(arguments, *name.split("/")) for name in ("--checkpoint", "-o/--output", "--strategy")}
    checkpoint, output = options["--checkpoint"], options["-o/--output"]
    if command == "train" and checkpoint:
        go_on = f"Run the same command with --resume to go on from {checkpoint}, if it was written before."
        if "--resume" in arguments:
            go_on = f"Run the same command again to go on from {checkpoint}."
    elif command == "train":
        go_on = "Nothing was kept. Train with --checkpoint FILE, and --resume goes on from that file."
    elif command == "compare":
        go_on = f"Run the same command again: it goes on from {_value(arguments, '--json') or 'compare.json'}."
    elif command == "noise":
        go_on = f"Run the same command again: it goes on from {output or 'noise.json'}."
    elif command == "search" and options["--strategy"] == "optuna":
        go_on = "Run the same command again to resume the study: the trials that are done are kept."
    elif options["--strategy"] == "milp":
        go_on = "Run the same command again: it goes on with the noise that was measured, and does the rest anew."
    else:
        go_on = "Run the same command again to start from the beginning."
    return f"stopped. {go_on}"


def _value(arguments: Sequence[str], *names: str) -> str | None:
    """Return the value of an option, ``--name value`` or ``--name=value``; the last one if it is repeated."""
    found = None
    for place, each in enumerate(arguments):
        name, equals, value = each.partition("=")
        if name in names and equals:
            found = value
        elif each in names and place + 1 < len(arguments):
            found = arguments[place + 1]
    return found
