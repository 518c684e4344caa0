"""`rayk quickstart --model`: a chat model teaches a copy of itself with fewer layers, on this machine alone.

The teacher answers the built-in prompts once; its answers are cached. The student keeps a third of the teacher's
layers, so at first it writes nonsense. It learns from the teacher's distributions on the teacher's answers. The report
shows the same prompts answered by the teacher, by the student before training, and by the student after it.
"""

import inspect
import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from rayk.commands.quickstart import QuickstartResult, clear_run, reused_folder
from rayk.config import Resources, RunConfig, TeacherConfig, TransformersEngineConfig, parse_config
from rayk.config.paths import absolute_path, path_exists
from rayk.data import quickstart_prompts
from rayk.data.text_encoder import TextEncoder
from rayk.errors import InputError
from rayk.models import load_model_config, load_tokenizer, weights_fingerprint
from rayk.report.report import write_report
from rayk.run import ProgressListener, distill
from rayk.serving.cluster import start_ray
from rayk.storage.atomic import replace_folder
from rayk.teachers import Completion, Teacher, serve_teacher

_TEACHER = "quickstart-teacher"
_MAX_NEW_TOKENS = 48
_GROUP = 64
"""Number of prompts that the teacher answers between two reports of progress."""
_ROWS = 300
_TRAINING: dict[str, Any] = {
    "epochs": 3, "batch_size": 8, "learning_rate": 8e-4, "warmup_steps": 10, "micro_batch_tokens": 2048,
}  # fmt: skip


def run_model_quickstart(
    model: str, output: Path, listener: ProgressListener, *, layers: int | None = None, rows: int = _ROWS
) -> QuickstartResult:
    """Distill `model` into a copy with fewer layers, and write the report to OUTPUT/report.html.

    Args:
        model: folder or hub id of a chat model.
        layers: number of the student's layers; by default a third of the teacher's.
        rows: number of training prompts.

    Raises:
        InputError: the model cannot be loaded, or its tokenizer has no chat template.
    """
    name = absolute_path(model) if path_exists(model) else model
    tokenizer, settings = load_tokenizer(name), load_model_config(name).get_text_config()
    if not tokenizer.chat_template:
        raise InputError(f"The tokenizer of '{model}' has no chat template; give --model a chat model.")
    layers = layers or max(1, settings.num_hidden_layers // 3)
    run, data = output / "student", _answers_folder(name, rows)
    config = student_config(name, data, run, layers)
    clear_run(run)
    start_ray(num_cpus=4)
    listener.stage("Starting the teacher on Ray Serve")
    engine = TransformersEngineConfig(threads=os.cpu_count())  # the student does not compute while the teacher answers
    teacher_settings = TeacherConfig(name=_TEACHER, model=name, engine=engine, resources=Resources(num_cpus=0.5))
    with serve_teacher(teacher_settings) as teacher:
        if data.is_dir():
            listener.stage(f"The teacher's answers are cached in {data}")
        else:
            _write_answers(teacher, TextEncoder(tokenizer), data, rows, listener)
        result = distill(config, listener=listener)
    report = output / "report.html"
    write_report([result.output], report)
    return QuickstartResult([result.summary], report)


def student_config(model: str, data: Path, output: Path, layers: int) -> RunConfig:
    """Return the config of the student's run."""
    return parse_config(
        {
            "name": f"student-of-{layers}-layers",
            "output": str(output),
            "teachers": [{"name": _TEACHER, "attach": True}],
            "student": {"model": model, "layers": layers},
            "data": {
                "train": {"path": str(data / "train.jsonl")},
                "evaluation": {"path": str(data / "evaluation.jsonl")},
                "chat_template": True,
            },
            "method": {"kind": "logit_kd", "support": {"kind": "topk", "k": 64}},
            "cache": {"path": str(data / "signals")},
            "training": _TRAINING | {"resources": {"num_cpus": 1}},
            "evaluation": {"answer_type": "open", "generation": {"max_new_tokens": _MAX_NEW_TOKENS}, "samples": 24},
        }
    )


def _answers_folder(model: str, rows: int) -> Path:
    """Return the folder of the teacher's answers; other weights or prompts have another folder."""
    commit = getattr(load_model_config(model), "_commit_hash", None)
    version = [inspect.getsource(quickstart_prompts), model, weights_fingerprint(model, commit), str(rows)]
    return reused_folder("\n".join(version))


def _write_answers(teacher: Teacher, encoder: TextEncoder, folder: Path, rows: int, listener: ProgressListener) -> None:
    """Let the teacher answer the prompts of both splits; answers that are not finished in time are left out."""
    with replace_folder(folder) as unfinished:
        for split in ("train", "evaluation"):
            prompts = quickstart_prompts.prompts(split)[: rows if split == "train" else None]
            listener.stage(f"The teacher answers {len(prompts)} {split} prompts")
            ids = [np.array(encoder.chat_prompt([_message(prompt)], "--model"), np.int32) for prompt in prompts]
            answers: list[Completion] = []
            for start in range(0, len(ids), _GROUP):
                listener.progress(start, len(ids), "answers")
                group = ids[start : start + _GROUP]
                answers += teacher.generate(group, max_new_tokens=_MAX_NEW_TOKENS, temperature=0.0)
            written = [
                {"prompt": prompt, "completion": answer.text.strip()}
                for prompt, answer in zip(prompts, answers, strict=True)
                if answer.finish_reason == "stop" and answer.text.strip()
            ]
            if not written:
                raise InputError(
                    f"The model ended none of its answers within {_MAX_NEW_TOKENS} tokens; give another --model."
                )
            lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in written)
            (unfinished / f"{split}.jsonl").write_text(lines, encoding="utf-8")


def _message(prompt: str) -> dict[str, Any]:
    return {"role": "user", "content": prompt}
