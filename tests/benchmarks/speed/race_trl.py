"""The peer's side of the benchmarks `race` and `on_policy`, run in an environment that has TRL: GKD in one process, with
`lmbda` 0 on the rows' completions and forward KL, with 1 on what the student writes and reverse KL.

python race_trl.py SETTINGS.json      prints two lines of JSON: seconds spent in each part of the steps, and
                                      [[non-pad tokens, seconds] of each step]
"""

import json
import sys
import time
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl.experimental.gkd import GKDConfig, GKDTrainer
from trl.experimental.utils import DataCollatorForChatML

given = json.loads(Path(sys.argv[1]).read_text())
torch.set_num_threads(given["threads"])
tokenizer = AutoTokenizer.from_pretrained(given["student"])
student = AutoModelForCausalLM.from_pretrained(given["student"], dtype=torch.float32)
teacher = AutoModelForCausalLM.from_pretrained(given["teacher"], dtype=getattr(torch, given["teacher_dtype"]))
lines = Path(given["rows"]).read_text().splitlines()[: given["steps"] * given["batch_size"]]
rows = [json.loads(line) for line in lines]
collate, batches, steps = DataCollatorForChatML(tokenizer=tokenizer, max_length=1024), [], []
parts = {}


def timed(owner, name, part):
    """Have `owner.name` note its seconds under `part`."""
    work = getattr(owner, name)

    def noting(*arguments, **options):
        began = time.perf_counter()
        result = work(*arguments, **options)
        parts[part] = parts.get(part, 0.0) + time.perf_counter() - began
        return result

    setattr(owner, name, noting)


def counting(examples):
    batch = collate(examples)
    own = given["lmbda"] == 1  # the student writes the completions, as good as always to the limit with random weights
    tokens = int(batch["prompt_attention_mask" if own else "attention_mask"].sum())
    batches.append(tokens + own * given["max_new_tokens"] * len(examples))
    return batch


class Clock(TrainerCallback):
    def on_train_begin(self, *_, **__):
        self.last = time.perf_counter()

    def on_step_end(self, *_, **__):
        now = time.perf_counter()
        steps.append(now - self.last)
        self.last = now


arguments = GKDConfig(
    output_dir=given["output"], lmbda=given["lmbda"], beta=given["lmbda"], temperature=1.0,
    max_new_tokens=given["max_new_tokens"], max_length=1024, per_device_train_batch_size=given["batch_size"],
    max_steps=given["steps"], learning_rate=1e-4, lr_scheduler_type="constant", save_strategy="no", report_to=[],
    logging_steps=given["steps"], use_cpu=True, bf16=given["precision"] == "bfloat16", disable_tqdm=True,
    gradient_checkpointing=False,
)  # fmt: skip
trainer = GKDTrainer(
    model=student, teacher_model=teacher, args=arguments, data_collator=counting, processing_class=tokenizer,
    train_dataset=Dataset.from_list([{"messages": row["messages"]} for row in rows]), callbacks=[Clock()],
)  # fmt: skip
timed(teacher, "forward", "teacher forward")
timed(student, "forward", "student forward")
timed(trainer, "generalized_jsd_loss", "loss")
timed(trainer.accelerator, "backward", "backward")
trainer.train()
print(json.dumps(parts | {"all": sum(steps)}))
print(json.dumps([list(pair) for pair in zip(batches, steps, strict=False)]))
