"""`lora-core completion`: a script with which a shell completes commands and options."""

import argparse
import re
import shlex
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from lora_core._cli.answers import Answer
from lora_core._cli.arguments import command

if TYPE_CHECKING:
    from lora_core._cli.arguments import Commands

_BASH = """\
# load with: source <(lora-core completion bash)
_lora_core() {{
    local word=${{COMP_WORDS[COMP_CWORD]}} option=${{COMP_WORDS[COMP_CWORD-1]}} words=""
    # bash takes an equals sign for a word of its own
    if [[ $option == "=" ]]; then option=${{COMP_WORDS[COMP_CWORD-2]}}; fi
    if [[ $word == "=" ]]; then word=""; fi
    if (( COMP_CWORD == 1 )); then
        words="{words}"
    else
        case "${{COMP_WORDS[1]}} $option" in
{choices}
        esac
        if [[ -z $words && $word == -* ]]; then
            case "${{COMP_WORDS[1]}}" in
{options}
            esac
        elif [[ -z $words ]]; then
            case "${{COMP_WORDS[1]}}" in
{places}
            esac
        fi
    fi
    COMPREPLY=($(compgen -W "$words" -- "$word"))
}}
complete -o bashdefault -o default -F _lora_core lora-core"""

_ZSH = """\
#compdef lora-core
# load with: source <(lora-core completion zsh), after compinit
_lora_core() {{
    local -a commands=(
{commands}
    )
    if (( CURRENT == 2 )); then
        _describe command commands
        _arguments {options}
        return
    fi
    local name=$words[2]
    shift words
    (( CURRENT-- ))
    case $name in
{cases}
    esac
}}
compdef _lora_core lora-core"""


def add(commands: "Commands") -> None:
    """Adds the command."""
    parser = command(
        commands,
        "completion",
        _run,
        "print a script with which your shell completes commands and options",
        "Prints a completion script. In ~/.bashrc: source <(lora-core completion bash). In"
        " ~/.zshrc, after compinit: source <(lora-core completion zsh). In fish's config.fish:"
        " lora-core completion fish | source.",
    )
    parser.add_argument("shell", choices=tuple(_SCRIPTS), help="the shell")


def _run(args: argparse.Namespace) -> Answer:
    script = _SCRIPTS[args.shell](args.whole)
    return Answer({"shell": args.shell, "script": script}, script)


def options_of(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """The options of a parser, in the order of its help."""
    return (action for action in parser._actions if action.option_strings)


def commands_of(whole: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """The parsers of the commands by name."""
    for action in whole._actions:
        if isinstance(action, argparse._SubParsersAction):
            return dict(action.choices)
    return {}


def _summaries(whole: argparse.ArgumentParser) -> dict[str, str]:
    for action in whole._actions:
        if isinstance(action, argparse._SubParsersAction):
            return {choice.dest: choice.help or "" for choice in action._choices_actions}
    return {}


def _words(parser: argparse.ArgumentParser) -> str:
    return " ".join(word for action in options_of(parser) for word in action.option_strings)


def _choices(action: argparse.Action) -> str:
    return " ".join(map(str, action.choices or ()))


def _bash(whole: argparse.ArgumentParser) -> str:
    choices, options, places = [], [], []
    for name, parser in commands_of(whole).items():
        options.append(f'                {name}) words="{_words(parser)}" ;;')
        for action in parser._actions:
            if not action.choices:
                continue
            if not action.option_strings:
                places.append(f'                {name}) words="{_choices(action)}" ;;')
            choices += [
                f'            "{name} {word}") words="{_choices(action)}" ;;'
                for word in action.option_strings
            ]
    return _BASH.format(
        words=f"{' '.join(commands_of(whole))} {_words(whole)}",
        choices="\n".join(choices),
        options="\n".join(options),
        places="\n".join(places),
    )


def _zsh(whole: argparse.ArgumentParser) -> str:
    commands = [
        f"        {shlex.quote(f'{name}:{_escaped(summary)}')}"
        for name, summary in _summaries(whole).items()
    ]
    cases = []
    for name, parser in commands_of(whole).items():
        shown = [
            _zsh_spec(word, action)
            for action in options_of(parser)
            for word in action.option_strings
        ]
        places = [a for a in parser._actions if not a.option_strings]
        last = next((f"*:{a.dest}:({_choices(a)})" for a in places if a.choices), "*:file:_files")
        cases.append(f"        {name}) _arguments {' '.join(shown)} {shlex.quote(last)} ;;")
    tops = [_zsh_spec(w, action) for action in options_of(whole) for w in action.option_strings]
    return _ZSH.format(commands="\n".join(commands), options=" ".join(tops), cases="\n".join(cases))


def _zsh_spec(word: str, action: argparse.Action) -> str:
    takes = action.nargs != 0
    values = f"({_choices(action)})" if action.choices else "_files"
    spec = f"{word}{'=' if takes and word.startswith('--') else ''}[{_escaped(action.help or '')}]"
    spec += f":{action.dest}:{values}" if takes else ""
    return shlex.quote(f"*{spec}")


def _escaped(text: str) -> str:
    return re.sub(r"([\[\]:])", r"\\\1", text)


def _fish(whole: argparse.ArgumentParser) -> str:
    lines = ["# load with: lora-core completion fish | source"]
    first = "complete -c lora-core -n __fish_use_subcommand"
    lines += [
        f"{first} -f -a {name} -d {_fish_quoted(summary)}"
        for name, summary in _summaries(whole).items()
    ]
    lines += [f"{first} {_fish_option(action)}" for action in options_of(whole)]
    for name, parser in commands_of(whole).items():
        here = f"complete -c lora-core -n '__fish_seen_subcommand_from {name}'"
        lines += [f"{here} {_fish_option(action)}" for action in options_of(parser)]
        lines += [
            f"{here} -f -a {_fish_quoted(_choices(action))}"
            for action in parser._actions
            if action.choices and not action.option_strings
        ]
    return "\n".join(lines)


def _fish_option(action: argparse.Action) -> str:
    words = [
        f"-l {word[2:]}" if word.startswith("--") else f"-s {word[1:]}"
        for word in action.option_strings
    ]
    if action.choices:
        words.append(f"-x -a {_fish_quoted(_choices(action))}")
    elif action.nargs != 0:
        words.append("-r")
    return f"{' '.join(words)} -d {_fish_quoted(action.help or '')}"


def _fish_quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"


_SCRIPTS: dict[str, Callable[[argparse.ArgumentParser], str]] = {
    "bash": _bash,
    "zsh": _zsh,
    "fish": _fish,
}
