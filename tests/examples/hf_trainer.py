"""Distillation inside the `Trainer` of transformers: a data set of batches with signals, and a loss on both."""

from collections.abc import Iterator
from typing import Any

from torch.utils.data import IterableDataset
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

import rayk


class Distillation(IterableDataset):
    """Batches with the teacher's signals, requested while the student trains on earlier ones."""

    def __init__(self, teacher: rayk.Teacher, batches: list) -> None:
        self.teacher, self.batches = teacher, batches

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for batch, signals in self.teacher.stream(self.batches, support=rayk.TopK(64), prefetch=4):
            yield {"batch": batch, "signals": signals}


class DistillationTrainer(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        batch, signals = inputs["batch"], inputs["signals"]
        outputs = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
        per_token = rayk.losses.forward_kl(batch.counted(outputs.logits), signals)
        loss = rayk.losses.token_mean(per_token, count=batch.counted_tokens)
        return (loss, outputs) if return_outputs else loss


def train(teacher: rayk.Teacher, model: str, data: str, output: str, epochs: int = 1) -> list[float]:
    """Train `model` on the rows of `data`; return the loss of each step."""
    batches = rayk.make_batches(data, AutoTokenizer.from_pretrained(model), batch_size=8, shuffle_seed=0) * epochs
    arguments = TrainingArguments(
        output, max_steps=len(batches), per_device_train_batch_size=1, learning_rate=5e-3, weight_decay=0.01,
        lr_scheduler_type="constant", max_grad_norm=0.0, logging_steps=1, save_strategy="no", report_to="none",
        remove_unused_columns=False, disable_tqdm=True, use_cpu=True, accelerator_config={"dispatch_batches": False},
    )  # fmt: skip
    trainer = DistillationTrainer(
        AutoModelForCausalLM.from_pretrained(model), arguments, train_dataset=Distillation(teacher, batches),
        data_collator=lambda rows: rows[0],
    )  # fmt: skip
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
