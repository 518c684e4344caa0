"""TRL's side of the benchmark `on_policy`, run by a Python that has TRL: `DistillationTrainer` in one process.

    python distillation_trl.py SETTINGS.json

The student generates, and learns the exact reverse KL over the whole vocabulary. Prints two lines of JSON: the seconds
of each part of the steps, and [tokens without padding, seconds] of each step.
"""

import json
import sys
import time
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DistillationConfig, DistillationTrainer
from trl_clock import Clock

given = json.loads(Path(sys.argv[1]).read_text())
torch.set_num_threads(given["threads"])
tokenizer = AutoTokenizer.from_pretrained(given["student"], padding_side="left")
student = AutoModelForCausalLM.from_pretrained(given["student"], dtype=torch.float32)
teacher = AutoModelForCausalLM.from_pretrained(given["teacher"], dtype=getattr(torch, given["teacher_dtype"]))
lines = Path(given["rows"]).read_text().splitlines()[: given["steps"] * given["batch_size"]]
prompts = [json.loads(line)["messages"][:1] for line in lines]
batches, steps, parts = [], [], {"generation": 0.0}


class Timed(DistillationTrainer):
    def _generate_and_score_completions(self, inputs):
        began = time.perf_counter()
        batch = super()._generate_and_score_completions(inputs)
        parts["generation"] += time.perf_counter() - began
        batches.append(int(batch["prompt_mask"].sum() + batch["completion_mask"].sum()))
        return batch


arguments = DistillationConfig(
    output_dir=given["output"], beta=1.0, temperature=1.0, max_completion_length=given["max_new_tokens"],
    per_device_train_batch_size=given["batch_size"], max_steps=given["steps"], learning_rate=1e-4,
    lr_scheduler_type="constant", save_strategy="no", report_to=[], logging_steps=given["steps"], use_cpu=True,
    bf16=given["precision"] == "bfloat16", disable_tqdm=True, gradient_checkpointing=False,
)  # fmt: skip
trainer = Timed(
    model=student, teacher_model=teacher, args=arguments, processing_class=tokenizer, callbacks=[Clock(steps)],
    train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in prompts]),
)  # fmt: skip
trainer.train()
print(json.dumps(parts | {"all": sum(steps)}))
print(json.dumps([list(pair) for pair in zip(batches, steps, strict=False)]))
