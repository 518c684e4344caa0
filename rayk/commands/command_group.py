"""The group of all commands, which suggests a command for an unknown name."""

import difflib
from typing import Any

from typer.core import TyperGroup

from rayk.errors import InputError

_SYNONYMS = {
    "train": "run", "distill": "run", "distil": "run", "start": "run", "resume": "run", "eval": "evaluate",
    "test": "evaluate", "measure": "evaluate", "generate": "synthesize", "synthesise": "synthesize", "new": "init",
    "create": "init", "check": "doctor", "validate": "doctor", "compare": "report", "list": "methods",
    "deploy": "serve", "save": "export", "convert": "export", "checkpoint": "export", "demo": "quickstart",
}  # fmt: skip


class CommandGroup(TyperGroup):
    """The commands. The error for an unknown name suggests the closest command."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name = args[0]
        if self.get_command(ctx, name) is None and not name.startswith("-"):
            close = difflib.get_close_matches(name, [*self.commands, *_SYNONYMS], n=1)
            if close:
                raise InputError(f"There is no command '{name}'; did you mean '{_SYNONYMS.get(close[0], close[0])}'?")
            raise InputError(f"There is no command '{name}'; the commands are {', '.join(self.commands)}.")
        return super().resolve_command(ctx, args)
