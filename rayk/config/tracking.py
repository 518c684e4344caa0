"""Settings of where training curves go."""

from typing import Annotated, Literal

from pydantic import Field

from rayk.config.base import Settings

Name = Annotated[str, Field(min_length=1)]


class WandbConfig(Settings):
    """Curves in Weights & Biases; needs `pip install 'rayk[tracking]'`. The key is read from WANDB_API_KEY, which
    workers on other nodes need too."""

    project: Name = "rayk"
    """The project."""
    entity: Name | None = None
    """The user or team; `null`: the default of the key's owner."""
    group: Name | None = None
    """The group of runs that are shown together; `null`: none."""
    tags: list[str] = Field(default_factory=list)
    """Tags of the run."""
    mode: Literal["online", "offline"] | None = None
    """`offline` writes into OUTPUT/wandb, for `wandb sync`; `null`: WANDB_MODE, or online."""


class MlflowConfig(Settings):
    """Curves in MLflow; needs `pip install 'rayk[tracking]'`. User and password are read from MLflow's own variables,
    which workers on other nodes need too."""

    tracking_uri: Name | None = None
    """The server, such as http://mlflow:5000; `null`: MLFLOW_TRACKING_URI."""
    experiment: Name = "rayk"
    """The experiment; it is created if it does not exist."""
    tags: dict[str, str] = Field(default_factory=dict)
    """Tags of the run."""


class TrackingConfig(Settings):
    """Output of the training curves, in addition to `metrics.jsonl`. A resumed run continues its curves."""

    tensorboard: bool = True
    """Write TensorBoard files into OUTPUT/tensorboard."""
    wandb: WandbConfig | None = None
    """Send the curves to Weights & Biases; `null`: no."""
    mlflow: MlflowConfig | None = None
    """Send the curves to MLflow; `null`: no."""
