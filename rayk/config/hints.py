"""Hints for unknown keys: the names of settings in other libraries, and the section that a key belongs to."""

from rayk.config.base import closest, shorten
from rayk.config.marks import all_places
from rayk.config.run import RunConfig

KIND_NAMES = {
    "sft": "supervised", "dpo": "preference", "gkd": "on_policy", "opd": "on_policy", "kd": "logit_kd",
    "kl": "logit_kd", "distillation": "logit_kd", "icl": "in_context", "lmops": "minillm", "seqkd": "responses",
    "sequence_kd": "responses", "cot": "chain_of_thought", "lion": "adversarial", "hf": "transformers",
    "top_k": "topk", "top-k": "topk", "logits": "hidden",
}  # fmt: skip
"""rayk's kinds by other names of the same thing."""

KEY_NAMES = {
    "lr": "training.learning_rate", "max_steps": "training.steps", "num_steps": "training.steps",
    "num_epochs": "training.epochs", "num_train_epochs": "training.epochs",
    "per_device_train_batch_size": "training.batch_size", "train_batch_size": "training.batch_size",
    "lr_scheduler_type": "training.schedule", "lr_scheduler": "training.schedule",
    "warmup": "training.warmup_steps", "warmup_ratio": "training.warmup_share",
    "grad_clip": "training.max_grad_norm", "clip_grad": "training.max_grad_norm",
    "adam_betas": "training.betas", "save_steps": "training.checkpoint_every_steps",
    "save_total_limit": "training.keep_checkpoints", "bf16": "training.precision", "num_workers": "training.workers",
    "world_size": "training.workers", "eval_steps": "evaluation.every_steps", "eval": "evaluation",
    "load_best_model_at_end": "evaluation.keep_best", "metric_for_best_model": "evaluation.keep_best.metric",
    "early_stopping_patience": "evaluation.patience", "early_stopping": "evaluation.patience",
    "model_name": "student.model", "model_name_or_path": "student.model", "tokenizer_name": "student.tokenizer",
    "peft": "student.lora", "teacher": "teachers", "teacher_model": "teachers.model",
    "teacher_model_name_or_path": "teachers.model", "dataset": "data.train", "train_file": "data.train.path",
    "dataset_name": "data.train.path", "validation_file": "data.evaluation.path", "max_length": "data.max_tokens",
    "max_seq_length": "data.max_tokens", "max_seq_len": "data.max_tokens", "output_dir": "output",
    "run_name": "name", "random_seed": "seed", "lmbda": "method.student_fraction", "gpus": "resources.num_gpus",
    "num_gpus": "resources.num_gpus", "cpus": "resources.num_cpus",
    "gradient_accumulation_steps": "training.micro_batch_tokens",
}  # fmt: skip
"""Places of rayk's settings by their names in other libraries."""


def key_hint(key: str, section: str, allowed: list[str]) -> str:
    """Return the error sentence for an unknown key: the closest allowed key or the right section, and the allowed keys.

    Args:
        section: the place of the section with the key, such as "data.train".
        allowed: the section's keys.
    """
    return f"unknown key '{shorten(key)}'; {_suggestion(key, section, allowed)}Allowed: {', '.join(allowed)}"


def _suggestion(key: str, section: str, allowed: list[str]) -> str:
    known = key if key in KEY_NAMES else closest(key, [*allowed, *KEY_NAMES], cutoff=0.8)
    if known in KEY_NAMES and known not in allowed:
        return f"did you mean '{KEY_NAMES[known].removeprefix(f'{section}.')}'? "
    if known is not None:
        return f"did you mean '{known}'? "
    if parents := _parents(key, section):
        return f"it belongs under {' or '.join(parents)}. "
    if near := closest(key, allowed):
        return f"did you mean '{near}'? "
    near = closest(key, {place.rpartition(".")[2] for place in all_places(RunConfig)}, cutoff=0.8)
    return f"did you mean '{near}' under {' or '.join(_parents(near, section))}? " if near else ""


def _parents(key: str, section: str, most: int = 3) -> list[str]:
    """Return at most `most` sections that have this key, those inside `section` first."""
    places = [place.rpartition(".") for place in all_places(RunConfig)]
    parents = dict.fromkeys(parent or "the top level" for parent, _, name in places if name == key)
    return sorted(parents, key=lambda parent: (not parent.startswith(section), parent.count(".")))[:most]
