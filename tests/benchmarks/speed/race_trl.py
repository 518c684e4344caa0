"""TRL's side of the benchmarks `race` and `on_policy`, run by a Python that has TRL: `GKDTrainer` in one process.

    python race_trl.py SETTINGS.json

With `lmbda` 0 it trains on the rows' completions with forward KL, with 1 on the student's generations with reverse KL.
It prints two lines of JSON: the seconds of each part of the steps, and [tokens without padding, seconds] of each step.
"""

import json
import sys
import time
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl.experimental.gkd import GKDConfig, GKDTrainer
from trl.experimental.utils import DataCollatorForChatML
from trl_clock import Clock

given = json.loads(Path(sys.argv[1]).read_text())
torch.set_num_threads(given["threads"])
tokenizer = AutoTokenizer.from_pretrained(given["student"])
student = AutoModelForCausalLM.from_pretrained(given["student"], dtype=torch.float32)
teacher = AutoModelForCausalLM.from_pretrained(given["teacher"], dtype=getattr(torch, given["teacher_dtype"]))
lines = Path(given["rows"]).read_text().splitlines()[: given["steps"] * given["batch_size"]]
rows = [json.loads(line) for line in lines]
collate, batches, steps = DataCollatorForChatML(tokenizer=tokenizer, max_length=1024), [], []
parts = {}


def record_time(owner, name, part):
    """Make `owner.name` add its seconds to `parts[part]`."""
    work = getattr(owner, name)

    def recorded(*arguments, **options):
        began = time.perf_counter()
        result = work(*arguments, **options)
        parts[part] = parts.get(part, 0.0) + time.perf_counter() - began
        return result

    setattr(owner, name, recorded)


def collate_and_count(examples):
    batch = collate(examples)
    generates = (
        given["lmbda"] == 1
    )  # the student generates; with random weights nearly every completion reaches the limit
    tokens = int(batch["prompt_attention_mask" if generates else "attention_mask"].sum())
    batches.append(tokens + generates * given["max_new_tokens"] * len(examples))
    return batch


arguments = GKDConfig(
    output_dir=given["output"], lmbda=given["lmbda"], beta=given["lmbda"], temperature=1.0,
    max_new_tokens=given["max_new_tokens"], max_length=1024, per_device_train_batch_size=given["batch_size"],
    max_steps=given["steps"], learning_rate=1e-4, lr_scheduler_type="constant", save_strategy="no", report_to=[],
    logging_steps=given["steps"], use_cpu=True, bf16=given["precision"] == "bfloat16", disable_tqdm=True,
    gradient_checkpointing=False,
)  # fmt: skip
trainer = GKDTrainer(
    model=student, teacher_model=teacher, args=arguments, data_collator=collate_and_count, processing_class=tokenizer,
    train_dataset=Dataset.from_list([{"messages": row["messages"]} for row in rows]), callbacks=[Clock(steps)],
)  # fmt: skip
record_time(teacher, "forward", "teacher forward")
record_time(student, "forward", "student forward")
record_time(trainer, "generalized_jsd_loss", "loss")
record_time(trainer.accelerator, "backward", "backward")
trainer.train()
print(json.dumps(parts | {"all": sum(steps)}))
print(json.dumps([list(pair) for pair in zip(batches, steps, strict=False)]))
