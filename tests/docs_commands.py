"""Checks a command of the documentation against the real command line, and runs nothing."""

import importlib
import json
import re
import shlex
from itertools import pairwise

from docs_pages import ROOT
from typer import Typer, TyperException
from typer.main import get_command

from deltadecode.cli.app import app

# Commands of other projects that need no check.
OTHERS = {"git", "cd"}


class WrongCommand(AssertionError):
    """A command that would not work as it is printed."""


def targets():
    """Targets of the Makefile."""
    return set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def extras():
    """Extras of the library, from its pyproject.toml."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    section = text.split("[project.optional-dependencies]")[1].split("\n[")[0]
    return set(re.findall(r"^([a-z-]+) = \[", section, re.MULTILINE))


def benchmark(name):
    """The command of ``python -m benchmarks.NAME``."""
    try:
        module = importlib.import_module(f"benchmarks.{name}.__main__")
    except ModuleNotFoundError as error:
        raise WrongCommand(f"no benchmark {name!r}") from error
    typer = Typer()
    typer.command()(getattr(module, name))
    return get_command(typer)


def lines(block):
    """Commands of a shell block, continued lines joined, comments left out."""
    joined = block.replace("\\\n", " ")
    return [words for line in joined.splitlines() if (words := shlex.split(line, comments=True))]


def check(words):
    """Raise WrongCommand unless the command exists and takes its arguments.

    Files that it names have to exist in the working directory, if the command looks for them
    before it starts.
    """
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words = words[1:]
    program, *rest = words
    program = program.rpartition("/")[2]
    if program == "deltadecode":
        _deltadecode(rest)
    elif program == "make":
        _make(rest)
    elif program == "python":
        _python(rest)
    elif program == "pip":
        _pip(rest)
    elif program == "vllm":
        _vllm(rest)
    elif program == "pytest":
        _paths(rest)
    elif program == "pre-commit":
        if not (ROOT / ".pre-commit-config.yaml").exists():
            raise WrongCommand("there are no hooks")
    elif program not in OTHERS:
        raise WrongCommand(f"unknown command {shlex.join(words)!r}; teach tests/docs_commands.py")


def check_span(span):
    """Raise WrongCommand unless what stands in the text, whole or not, names what exists."""
    words = shlex.split(span)
    if words[0] == "make" or "training/" in span:
        check(words)
        return
    if words[0] == "python":
        command, rest = benchmark(words[2].partition(".")[2]), words[3:]
    else:
        command, rest = get_command(app), words[1:]
        if rest and not rest[0].startswith("-"):
            command, rest = _command(rest[0]), rest[1:]
    known = {option for parameter in command.params for option in parameter.opts}
    known |= {option for parameter in command.params for option in parameter.secondary_opts}
    known |= {"--help"}
    for word in rest:
        option = word.partition("=")[0]
        passed_on = command.context_settings.get("ignore_unknown_options")
        if option.startswith("-") and option not in known and not passed_on:
            raise WrongCommand(f"{span!r}: there is no option {option!r}")


def _command(name):
    commands = get_command(app).commands
    if name not in commands:
        raise WrongCommand(f"there is no command {name!r}; there are {', '.join(commands)}")
    return commands[name]


def _parse(command, name, arguments):
    if "--help" in arguments:
        return
    try:
        command.make_context(name, list(arguments))
    except TyperException as error:
        raise WrongCommand(f"{name} {shlex.join(arguments)}: {error.format_message()}") from error


def _deltadecode(arguments):
    if arguments[0].startswith("-"):
        _parse(get_command(app), "deltadecode", arguments)
    else:
        _parse(_command(arguments[0]), arguments[0], arguments[1:])


def _make(arguments):
    for word in arguments:
        if word.startswith("ARGS="):
            _paths(shlex.split(word[5:]))
        elif "=" not in word and word not in targets():
            raise WrongCommand(f"make has no target {word!r}")


def _python(arguments):
    if arguments[0] == "-m":
        package, _, name = arguments[1].partition(".")
        if package == "benchmarks" and "." not in name:
            _parse(benchmark(name), name, arguments[2:])
            return
        arguments = [arguments[1].replace(".", "/") + ".py", *arguments[2:]]
    script = ROOT / arguments[0]
    if not script.exists():
        raise WrongCommand(f"there is no {arguments[0]}")
    for word in arguments[1:]:
        if word.startswith("--") and f'"{word}"' not in script.read_text(encoding="utf-8"):
            raise WrongCommand(f"{arguments[0]} has no option {word}")


def _pip(arguments):
    if arguments[0] != "install":
        raise WrongCommand(f"pip {arguments[0]}")
    for word in arguments[1:]:
        name, _, wanted = word.rstrip("]").partition("[")
        if name in (".", "deltadecode"):
            unknown = set(filter(None, wanted.split(","))) - extras()
            if unknown:
                raise WrongCommand(f"there is no extra {', '.join(unknown)}")
        elif name.startswith("./") and not (ROOT / name / "pyproject.toml").exists():
            raise WrongCommand(f"there is no package in {name}")


def _vllm(arguments):
    from deltadecode.config import DeltaConfig

    if arguments == ["serve", "FOLDER"]:
        return  # a CLSA model, which needs no option
    if arguments[0] != "serve" or ("--attention-backend", "CUSTOM") not in pairwise(arguments):
        raise WrongCommand(f"vllm {shlex.join(arguments)} serves without DELTA")
    if "--additional-config" in arguments:
        settings = json.loads(arguments[arguments.index("--additional-config") + 1])["deltadecode"]
        keys = {"plan", "sync_heads", "on_unsupported", "min_tokens"}
        DeltaConfig(**{key: value for key, value in settings.items() if key not in keys})


def _paths(arguments):
    for word in arguments:
        if "/" in word and not (ROOT / word.partition("::")[0]).exists():
            raise WrongCommand(f"there is no {word}")
