"""`rayk quickstart --model`: a chat model teaches a copy of itself with fewer layers, on this machine alone.

The teacher answers the built-in prompts (once per model; the answers are cached). The student has a third of the
teacher's layers: what is left of the weights writes nonsense at first. It learns from the teacher's distributions on
the teacher's own answers (logit KD on a SeqKD corpus). The report shows the same prompts answered by the teacher, by
the student before, and by the student after training.
"""

import hashlib
import inspect
import json
from pathlib import Path
from typing import Any

from rayk.commands.quickstart import QuickstartResult, cache_folder_of, clear_run
from rayk.config import RunConfig, TeacherConfig, parse_config
from rayk.data import quickstart_prompts
from rayk.data.text_encoder import TextEncoder
from rayk.errors import InputError
from rayk.models import load_model_config, load_tokenizer, weights_fingerprint
from rayk.report.report import write_report
from rayk.run import ProgressListener, distill
from rayk.serving.cluster import start_ray
from rayk.storage.atomic import replace_folder
from rayk.teachers import Teacher, serve_teacher

_TEACHER = "quickstart-teacher"
_NEW_TOKENS = 40
_TRAINING = {
    "epochs": 4, "batch_size": 16, "learning_rate": 5e-4, "warmup_steps": 20, "micro_batch_tokens": 2048,
    "checkpoint_every_steps": 100,
}  # fmt: skip
