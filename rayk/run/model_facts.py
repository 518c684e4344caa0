"""`model.json` in a run directory: the facts about the saved model that its weights do not contain."""

from pathlib import Path

from pydantic import BaseModel, ValidationError

from rayk.errors import InputError
from rayk.run.inputs import Inputs
from rayk.storage.atomic import write_whole

_FILE = "model.json"


class ModelFacts(BaseModel):
    """Facts that follow from the run's rows and teachers, so that `rayk export` needs neither of them."""

    tokenizer: str
    """The folder or hub id of the tokenizer."""
    ends: tuple[int, ...]
    """Ids of the tokens that end the completions that are trained on."""
    chat_template: str | None
    """The template that is saved with the tokenizer; None: its own."""

    @classmethod
    def of_inputs(cls, inputs: Inputs) -> "ModelFacts":
        """Return the facts of a run's inputs."""
        return cls(tokenizer=inputs.tokenizer_name, ends=inputs.trained_ends, chat_template=inputs.chat_template)

    def write(self, folder: Path) -> None:
        """Write `model.json`; raises the errors of `write_whole`."""
        write_whole(folder / _FILE, self.model_dump_json(indent=2).encode())


def read_model_facts(folder: Path) -> ModelFacts | None:
    """Return the content of `model.json`; None if the run was started by an earlier version, which wrote none.

    Raises:
        InputError: the file is damaged.
    """
    file = folder / _FILE
    if not file.exists():
        return None
    try:
        return ModelFacts.model_validate_json(file.read_bytes())
    except (OSError, ValidationError) as error:
        raise InputError(
            f"'{file}' cannot be read; remove it, so that the rows of the run are read instead."
        ) from error
