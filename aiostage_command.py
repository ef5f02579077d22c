"""The command ``aiostage``: its arguments, its help, and what answers without PyTorch.

It lies outside of the package, whose import brings PyTorch and takes a second or more. ``aiostage --help``,
``aiostage --version`` and the completion of a shell do not need that.
"""

from __future__ import annotations

import argparse
import platform
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version

__version__ = "0.1.0"

__all__ = ["build_parser", "main"]

_PLACE = "a path, or a URL such as s3://bucket/runs/7"
_STATUS = """\
exit status:
  0  all is well
  1  a checkpoint is damaged, or the two of diff differ
  2  wrong arguments
  3  it could not be done; the reason is on stderr
"""

_BASH_OR_ZSH = """\
if [ -n "$ZSH_VERSION" ]; then autoload -U +X bashcompinit && bashcompinit; fi
_aiostage() {{
  local options='' words='' word="${{COMP_WORDS[COMP_CWORD]}}"
  if [ "$COMP_CWORD" -eq 1 ]; then
    COMPREPLY=($(compgen -W '{commands} --help --version' -- "$word"))
    return
  fi
  case "${{COMP_WORDS[1]}}" in
{cases}
  esac
  case "$word" in
    -*) COMPREPLY=($(compgen -W "$options" -- "$word")) ;;
    *) COMPREPLY=($(compgen -W "$words" -- "$word")) ;;
  esac
}}
complete -o default -F _aiostage aiostage
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: As a shell passes them, without the program; None for those of the process.

    Returns:
        The exit status: 0 if all is well; 1 if a checkpoint is damaged or two differ; 3 if it could not be done, with
        the reason on stderr; as from the signal if it was interrupted, or if the reader of its output has stopped.

    Raises:
        SystemExit: For wrong arguments, with status 2; and for ``--help`` and ``--version``.
    """
    options = build_parser().parse_args(arguments)
    if options.command == "completion":
        print(_completion(options.shell), end="")
        return 0
    from aiostage.cli.main import run

    return run(options)


def build_parser() -> argparse.ArgumentParser:
    """Return what parses the arguments."""
    parser = argparse.ArgumentParser(
        prog="aiostage",
        description="Look at checkpoints, compare, verify and convert them; measure staging on this machine.",
        epilog=_STATUS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--version", action=_Version, nargs=0, help="print the versions of aiostage, Python and PyTorch"
    )
    every = argparse.ArgumentParser(add_help=False)
    every.add_argument("--json", action="store_true", help="print one JSON document instead of text")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, text: str) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.", parents=[every])

    add("ls", "list the checkpoints of a run, with step, age and size").add_argument("source", help=_PLACE)
    add("du", "tell how many bytes a run takes, and which of them its checkpoints share").add_argument(
        "source", help=_PLACE
    )
    look = add("inspect", "print the tree, the tensors and the files of a checkpoint")
    look.add_argument("source", help=f"{_PLACE}; a run is listed as by ls")
    look.add_argument("--files", action="store_true", help="print the files only, not the tree")
    check = add("verify", "compare every byte of checkpoints with their checksums")
    check.add_argument("sources", nargs="+", metavar="source", help=f"{_PLACE}; also of a run")
    check.add_argument("--progress", action="store_true", help="show a bar (needs tqdm)")
    compare = add("diff", "compare two checkpoints: keys, shapes, dtypes, values, and tensors element by element")
    compare.add_argument("first", help=_PLACE)
    compare.add_argument("second", help="another one")
    compare.add_argument("--no-values", action="store_true", help="compare no elements; only headers are read")
    change = add("convert", "make a checkpoint of aiostage from one of another program")
    change.add_argument("source", help="a file of torch.save, Lightning or safetensors, or a directory; also of DCP")
    change.add_argument("target", help=f"the checkpoint to make: {_PLACE}")
    change.add_argument("--overwrite", action="store_true", help="replace a checkpoint that is there")
    change.add_argument(
        "--duplicate-tied",
        action="store_true",
        help="write tied tensors under each of their names, for programs that read the safetensors files alone",
    )
    measure = add("bench", "measure staging on this machine")
    measure.add_argument("--mebibytes", type=_positive, default=512, help="size of the state dict (512)")
    measure.add_argument("--tensors", type=_positive, default=64, help="how many tensors it has (64)")
    measure.add_argument("--rounds", type=_positive, default=5, help="how often each is measured (5)")
    commands.add_parser(
        "completion",
        help="print what completes these commands in bash, zsh and fish",
        description='Print a script for a shell. In .bashrc or .zshrc: eval "$(aiostage completion)". '
        "In config.fish: aiostage completion fish | source.",
    ).add_argument(
        "shell", nargs="?", choices=("bash", "zsh", "fish"), default="bash", help="which one (bash; zsh reads the same)"
    )
    return parser


class _Version(argparse.Action):
    """Prints versions; finding that of PyTorch out takes a while, so it waits until it is asked for."""

    def __call__(self, parser: argparse.ArgumentParser, *ignored: object) -> None:
        try:
            torch = version("torch")
        except PackageNotFoundError:
            torch = "missing"
        print(f"aiostage {__version__} (Python {platform.python_version()}, torch {torch})")
        parser.exit()


def _completion(shell: str) -> str:
    """Return a script by which a shell completes commands and options; paths are left to the shell."""
    commands = next(action for action in build_parser()._actions if isinstance(action, argparse._SubParsersAction))
    help_of = {action.dest: action.help or "" for action in commands._choices_actions}
    if shell == "fish":
        lines = [_fish("__fish_use_subcommand", f"-f -a {name}", text) for name, text in help_of.items()]
        lines += [_fish("__fish_use_subcommand", f"-l {name}") for name in ("help", "version")]
        for name, parser in commands.choices.items():
            seen = f"__fish_seen_subcommand_from {name}"
            for action in parser._actions:
                long = [f"-l {text[2:]}" for text in action.option_strings if text.startswith("--")]
                words = [f"-f -a '{' '.join(action.choices)}'"] if action.choices else []
                lines += [_fish(seen, what, action.help or "") for what in long + words]
        return "".join(lines)
    cases = []
    for name, parser in commands.choices.items():
        options = " ".join(text for action in parser._actions for text in action.option_strings)
        choices = " ".join(text for action in parser._actions for text in action.choices or ())
        cases.append(f"    {name}) options='{options}' words='{choices}' ;;")
    return _BASH_OR_ZSH.format(commands=" ".join(help_of), cases="\n".join(cases))


def _fish(condition: str, what: str, text: str = "") -> str:
    described = " -d '" + text.replace("\\", "\\\\").replace("'", "\\'") + "'" if text else ""
    return f"complete -c aiostage -n '{condition}' {what}{described}\n"


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r:.80} is not a whole number from 1")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
