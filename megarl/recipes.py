"""`megarl recipes`: the configurations that come with MegaRL, from a clone or from an installed wheel."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from textwrap import shorten

from megarl.errors import UserError

_PACKAGE = Path(__file__).parent


def shipped_directory() -> Path:
    """The directory with the configurations: inside the installed package, or beside it in a clone."""
    for directory in (_PACKAGE / "configs", _PACKAGE.parent / "configs"):
        if directory.is_dir():
            return directory
    raise UserError(f"megarl recipes: this installation has no configurations ({_PACKAGE / 'configs'})")


def recipes() -> dict[str, Path]:
    """Every shipped configuration by its name, the path without .yaml."""
    root = shipped_directory()
    return {str(path.relative_to(root).with_suffix("")): path for path in sorted(root.rglob("*.yaml"))}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the subcommands to `megarl recipes`."""
    commands = parser.add_subparsers(dest="recipes_command", required=True, metavar="ls | show | cp")
    commands.add_parser("ls", help="list them, with a line each", allow_abbrev=False)
    show = commands.add_parser("show", help="print one", allow_abbrev=False)
    copy = commands.add_parser("cp", help="copy one to edit it", allow_abbrev=False)
    for command in (show, copy):
        command.add_argument("name", metavar="NAME", help="as `megarl recipes ls` lists it")
    copy.add_argument("file", metavar="FILE", nargs="?", type=Path, help="default: NAME.yaml here")


def run(options: argparse.Namespace) -> int:
    """Run `megarl recipes`.

    Raises:
        UserError: no recipe of that name, or the file exists already.
    """
    found = recipes()
    if options.recipes_command == "ls":
        width = max(map(len, found))
        for name, path in found.items():
            print(f"{name:{width}}  {_first_sentence(path)}")
        return 0
    name = options.name.removesuffix(".yaml").removeprefix("configs/")
    chosen = found.get(name) or found.get(f"recipes/{name}")
    if chosen is None:
        raise UserError(f"megarl recipes: there is no {options.name}; `megarl recipes ls` lists them")
    if options.recipes_command == "show":
        print(chosen.read_text(encoding="utf-8"), end="")
        return 0
    target: Path = options.file or Path(chosen.name)
    if target.is_dir():
        target = target / chosen.name
    if target.exists():
        raise UserError(f"{target}: exists already; name another file")
    try:
        shutil.copyfile(chosen, target)
    except OSError as error:
        raise UserError(f"{target}: cannot be written: {error.strerror}") from error
    print(target)
    return 0


def _first_sentence(path: Path) -> str:
    """The first sentence of the comment on top of a file."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.lstrip("# "))
    sentence = " ".join(" ".join(lines).split()).partition(". ")[0].removesuffix(".")
    return shorten(sentence, 100, placeholder=" ...")
