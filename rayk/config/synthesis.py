"""Syntheses: training rows that teachers generate, distinguished by `kind`."""

import string
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from rayk.config.base import (
    FUNCTION_PATTERN,
    AnswerChoices,
    AnswerPattern,
    AnswerType,
    ClassPath,
    InputPath,
    Positive,
    Selection,
    Settings,
)
from rayk.config.filters import (
    EndingFilterConfig,
    FilterConfig,
    FilterSettings,
    LengthFilterConfig,
    NearDuplicatesFilterConfig,
    TextFilterConfig,
)
from rayk.config.sections import SamplingConfig, ServedStudentConfig, SynthesisSettings
from rayk.config.teachers import TeacherConfig


class AnswerConfig(Settings):
    """The form of answers, and the field of a row that contains the right answer."""

    type: AnswerType = "free"
    """The form of an answer in a completion. `choice`: one of the letters `choices`; `date`: in dates of numbers only,
    the month comes before the day; `free`: text up to the end of its line."""
    choices: AnswerChoices = "ABCDE"
    """The letters of type `choice`."""
    field: str = "answer"
    """The row's field with the right answer."""
    pattern: AnswerPattern | None = None
    """A regular expression with one group that finds the answer in that field, such as '#### (.+)'; the last match
    counts. `null`: the whole field."""


Scorer = Annotated[str, Field(pattern=rf"^(mean_logprob|answer|{FUNCTION_PATTERN[1:-1]})$")]


class StudentSynthesisConfig(SynthesisSettings):
    """Base of syntheses whose rows depend on the student."""

    student: ServedStudentConfig = Field(default_factory=ServedStudentConfig)
    """Serving of the student while it generates."""

    @property
    def reads_student(self) -> bool:
        return True

    @property
    def served_student(self) -> ServedStudentConfig | None:
        return self.student if self.reads_student else None


class ResponsesConfig(SynthesisSettings):
    """The teacher's answers to the rows' prompts (sequence-level KD)."""

    kind: Literal["responses"] = "responses"
    """The synthesis' kind."""
    samples: Positive = 1
    """Number of completions per prompt."""
    keep: Annotated[Literal["all", "best"], Selection()] = "all"
    """Keep all samples of a prompt, or the one with the highest score (the first, if several have it)."""
    scorer: Annotated[Scorer, Selection()] = "mean_logprob"
    """The score for `keep: best`. `mean_logprob`: the mean log-prob under the teacher; `answer`: 1 for a right answer,
    and no sample is kept if none is right; or your function 'module:name', called as
    `function(prompt, completion, row)`, which returns a number (higher is better)."""
    answer: Annotated[AnswerConfig, Selection()] = Field(default_factory=AnswerConfig)
    """The form of answers, for scorer `answer`."""

    @property
    def reads_truth(self) -> bool:
        return self.keep == "best" and self.scorer == "answer"

    @property
    def needs_logprobs(self) -> bool:
        return self.keep == "best" and self.scorer == "mean_logprob"


def _template_with(*needed: str):
    def check(template: str) -> str:
        try:
            names = {name for _, name, _, _ in string.Formatter().parse(template) if name is not None}
        except ValueError as error:
            raise ValueError(f"is not a template: {error}; write {{{{ and }}}} for literal braces") from error
        if names != set(needed):
            raise ValueError(f"needs the names {', '.join(f'{{{name}}}' for name in needed)} and no others")
        return template

    return AfterValidator(check)


def _refuse_thoughts(settings: SynthesisSettings) -> None:
    if settings.thoughts == "keep":
        raise ValueError(
            f"thoughts: synthesis '{settings.kind}' composes its rows from parts of several replies, so they cannot "
            "keep the replies' thoughts; leave it out"
        )


class RationaleSamplingConfig(SamplingConfig):
    """Sampling of rationales."""

    max_new_tokens: Positive = 128
    """Longest rationale in tokens."""


class ChainOfThoughtConfig(SynthesisSettings):
    """The teacher's step-by-step rationales that end in the right answer (Fine-tune-CoT)."""

    kind: Literal["chain_of_thought"] = "chain_of_thought"
    """The synthesis' kind."""
    sampling: RationaleSamplingConfig = Field(default_factory=RationaleSamplingConfig)
    """Sampling of rationales."""
    rationales: Positive = 1
    """Number of rationales per question (D in the paper)."""
    answer: Annotated[AnswerConfig, Selection()] = Field(default_factory=AnswerConfig)
    """The form of answers."""
    keep: Annotated[Literal["correct", "answered"], Selection()] = "correct"
    """`correct`: keep the rationales with the right answer. `answered`: keep all rationales with an answer, for rows
    without a right answer."""
    rationale_template: Annotated[str, _template_with("question")] = "Q: {question}\nA: Let's think step by step."
    """Prompt of the first request."""
    answer_template: Annotated[str, _template_with("asked", "rationale")] = (
        "{asked} {rationale}\nTherefore, the answer is"
    )
    """Prompt of the second request; {asked} is the prompt of the first request."""
    answer_tokens: Positive = 32
    """Longest answer to the second request in tokens; it is decoded greedily."""
    student_format: Annotated[Literal["delimiters", "plain"], Selection()] = "delimiters"
    """The form of the student's rows. `delimiters`: prompt `<question> ###`, completion `<rationale> --> <answer>`.
    `plain`: prompt `<question>`, completion `<rationale>\\nTherefore, the answer is <answer>.`; for
    `data.chat_template: true`."""

    @property
    def reads_truth(self) -> bool:
        return self.keep == "correct"

    @model_validator(mode="after")
    def _check_thoughts(self) -> "ChainOfThoughtConfig":
        _refuse_thoughts(self)
        return self


class ListSamplingConfig(SamplingConfig):
    """Sampling of lists of new instructions."""

    max_new_tokens: Positive = 1024
    """Longest list in tokens."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Sample from the most likely tokens with this total probability; 1: from all."""


class SelfInstructConfig(SynthesisSettings):
    """New tasks that the teacher generates, with inputs and answers (Self-Instruct); a base model is sufficient."""

    kind: Literal["self_instruct"] = "self_instruct"
    """The synthesis' kind."""
    seed_tasks: InputPath | None = None
    """The tasks to start from, a JSONL file in the paper's format: {"instruction": …, "is_classification": true or
    false, "instances": [{"input": …, "output": …}, …]}. `null`: rayk's own 70 tasks."""
    instructions: Annotated[Positive, Selection()] = 1000
    """Number of new instructions; fewer if the teacher only repeats itself. Each becomes up to 5 rows."""
    batch: Positive = 16
    """Number of lists, of 8 instructions each, that are requested before their instructions join the pool."""
    sampling: ListSamplingConfig = Field(default_factory=ListSamplingConfig)
    """Sampling of lists of instructions. The other requests are decoded greedily: whether a task is a classification
    task, and its instances."""
    instance_tokens: Positive = 350
    """Longest text in tokens with all instances of a task."""
    blacklist: Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Selection()] = (
        "image", "images", "graph", "graphs", "picture", "pictures", "file", "files", "map", "maps", "draw", "plot",
        "go to",
    )  # fmt: skip
    """Words that reject an instruction, because a text model cannot follow it; by default the paper's. []: none."""
    filters: Annotated[list[FilterConfig], Selection()] = Field(default_factory=list)
    """Filters of the rows, besides the recipe's own rules. The recipe already drops the last instance of a truncated
    answer; filter `truncated` would also reject the complete instances before it."""

    @property
    def makes_prompts(self) -> bool:
        return True

    @property
    def prefers_chat(self) -> bool:
        return False  # the recipe is made for base models, whose tokenizers often have a chat template too

    @model_validator(mode="after")
    def _check_thoughts(self) -> "SelfInstructConfig":
        _refuse_thoughts(self)
        return self


class InstructionSamplingConfig(SamplingConfig):
    """Sampling of instructions: from the model's own distribution, without truncation."""

    max_new_tokens: Positive = 2048
    """Longest instruction in tokens."""
    temperature: Annotated[float, Field(ge=0)] = 1.0
    """Sampling temperature; 0 is greedy decoding."""


class ResponseSamplingConfig(SamplingConfig):
    """Sampling of answers to instructions."""

    max_new_tokens: Positive = 4096
    """Longest answer in tokens."""
    temperature: Annotated[float, Field(ge=0)] = 0.0
    """Sampling temperature; 0 is greedy decoding."""


def _default_instruction_filters() -> list[TextFilterConfig]:
    return [
        LengthFilterConfig(minimum=3),
        EndingFilterConfig(),
        NearDuplicatesFilterConfig(fields=("prompt",)),
    ]


class MagpieConfig(SynthesisSettings):
    """Instructions that a chat model generates after the beginning of a user's turn, and its answers to them
    (Magpie)."""

    kind: Literal["magpie"] = "magpie"
    """The synthesis' kind."""
    instructions: Annotated[Positive, Selection()] = 1000
    """Number of instructions to sample; those that pass `instruction_filters` are answered."""
    system: Annotated[str, Field(min_length=1)] | None = None
    """A system prompt for sampling instructions, which may name a subject; answers are generated without it. `null`:
    none."""
    tokenizer: InputPath | None = None
    """The tokenizer whose chat template is used: a local folder or hub id; `null`: the teacher's own. An endpoint
    (engine kind `openai`) needs it, and `engine.chat: false`, because only plain completions can continue a turn."""
    sampling: InstructionSamplingConfig = Field(default_factory=InstructionSamplingConfig)
    """Sampling of instructions."""
    responses: ResponseSamplingConfig = Field(default_factory=ResponseSamplingConfig)
    """Sampling of answers."""
    role_words: tuple[Annotated[str, Field(min_length=1)], ...] = ("assistant",)
    """Words that also end an instruction, because a model may generate the next role's name without ending the turn. An
    instruction in which such a word occurs within a line is rejected. []: none."""
    stop_at_newline: bool = False
    """End each instruction after its first line."""
    instruction_filters: Annotated[list[TextFilterConfig], Selection()] = Field(
        default_factory=_default_instruction_filters
    )
    """Filters of the instructions before they are answered; the filters' `field` is ignored."""
    keep_longest: Annotated[Positive | None, Selection()] = None
    """Number of rows to keep: those with the longest answers, in characters, among the rows that pass `filters`;
    `null`: all."""

    @property
    def makes_prompts(self) -> bool:
        return True

    @property
    def all_filters(self) -> Sequence[FilterSettings]:
        return [*self.filters, *self.instruction_filters]

    @model_validator(mode="after")
    def _check_chat(self) -> "MagpieConfig":
        if self.chat:
            raise ValueError("synthesis.chat: 'magpie' always uses the teacher's chat template; leave it out")
        return self

    def check_teacher(self, teacher: TeacherConfig) -> None:
        super().check_teacher(teacher)
        own_template = teacher.engine.applies_chat_template
        if own_template and (not teacher.engine.continues_prompts or self.tokenizer is None):
            raise ValueError(
                "synthesis 'magpie' sends the beginning of a user's turn, which chat completions do not accept: "
                f"teacher '{teacher.name}' needs engine.chat: false (an endpoint that has plain completions), and "
                "synthesis.tokenizer with its chat template"
            )


class AnswerSamplingConfig(SamplingConfig):
    """Sampling of answers to instructions."""

    max_new_tokens: Positive = 1024
    """Longest answer in tokens."""


class RefereeSamplingConfig(SamplingConfig):
    """Sampling of comparisons of answers."""

    max_new_tokens: Positive = 512
    """Longest comparison in tokens."""
    temperature: Annotated[float, Field(ge=0)] = 0.2
    """Sampling temperature; 0 is greedy decoding."""


class AdversarialConfig(StudentSynthesisConfig):
    """In each of several `rounds`, new instructions similar to those where the student is behind the teacher (Lion)."""

    kind: Literal["adversarial"] = "adversarial"
    """The synthesis' kind."""
    referee: str | None = None
    """Which of `teachers` compares answers; `null`: the teacher that generates the rows."""
    sampling: AnswerSamplingConfig = Field(default_factory=AnswerSamplingConfig)
    """Sampling of the answers of teacher and student."""
    referee_sampling: Annotated[RefereeSamplingConfig, Selection()] = Field(default_factory=RefereeSamplingConfig)
    """Sampling of comparisons."""
    threshold: Annotated[float, Selection()] = 1.0
    """An instruction is hard if the teacher's answer scores at least this many points (of 10) above the student's, else
    easy."""
    instructions: Annotated[Positive, Selection()] = 3000
    """Number of new instructions per round that are generated from hard ones; fewer if the teacher only repeats itself,
    and none if there are no hard ones."""
    easy_instructions: Annotated[int, Field(ge=0)] | None = None
    """Number of new instructions per round that are generated from easy ones; `null`: the value of `instructions`."""
    batch: Positive = 64
    """Largest number of new instructions from hard ones, and from easy ones, that are requested at once."""
    instruction_temperature: Annotated[float, Field(ge=0)] = 1.0
    """Sampling temperature of new instructions."""
    instruction_tokens_per_word: Positive = 4
    """Longest new instruction, in tokens per word of the instruction that it is generated from; at least 32 tokens."""
    blacklist: Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Selection()] = (
        "instruction", "instructions", "given prompt", "new prompt",
    )  # fmt: skip
    """Words that reject a new instruction, because it talks about the request itself. []: none."""
    hard_template: Annotated[str, _template_with("instruction"), Selection()] | None = None
    """Prompt for a new instruction of the same domain and type as a hard one; `null`: rayk's own, with examples for
    base models and without for chat models."""
    easy_template: Annotated[str, _template_with("instruction"), Selection()] | None = None
    """Prompt for a rarer instruction of the same domain as an easy one; `null`: rayk's own."""
    referee_template: Annotated[str, _template_with("instruction", "first", "second"), Selection()] | None = None
    """Prompt for the scores of two answers, 'A' and 'B', from 1 to 10; `null`: rayk's own. Scores are read from lines
    such as 'Score of A: 8' (the last of each), else from the last line that has two numbers and nothing else."""

    @property
    def referee_name(self) -> str | None:
        return self.referee

    @property
    def instructions_of(self) -> dict[str, int]:
        """Number of new instructions per round, by the kind of instruction that they are generated from."""
        easy = self.instructions if self.easy_instructions is None else self.easy_instructions
        return {"hard": self.instructions, "easy": easy}

    def queries_student(self, round_number: int) -> bool:
        return round_number > 0


class PreferencesConfig(StudentSynthesisConfig):
    """A better and a worse answer to each prompt, for method `preference` (DPO). Filters read the better one, `chosen`,
    as `completion`; the other one is `rejected`."""

    kind: Literal["preferences"] = "preferences"
    """The synthesis' kind."""
    chosen: Annotated[Literal["teacher", "best"], Selection()] = "teacher"
    """`teacher`: the teacher's answer is the better one, the student's the worse one. `best`: of all samples, the one
    with the highest score is the better one, the one with the lowest score the worse one."""
    samples: Positive = 1
    """Number of the teacher's samples per prompt."""
    student_samples: Annotated[int, Field(ge=0)] = 1
    """Number of samples per prompt of the student, with its weights at the start of the round. With `chosen: teacher`,
    samples of teacher and student are paired one by one, and those of the model with fewer samples are used again."""
    student_sampling: SamplingConfig | None = None
    """Sampling of the student's answers. The student reads prompts in the form that section `data` gives them. `null`:
    as the teacher's."""
    scorer: Annotated[Scorer, Selection()] = "answer"
    """The score for `chosen: best`. `answer`: 1 for a right answer, else 0; `mean_logprob`: the mean log-prob under the
    teacher, only with `student_samples: 0`; or your function 'module:name', called as
    `function(prompt, completion, row)`, which returns a number (higher is better)."""
    answer: Annotated[AnswerConfig, Selection()] = Field(default_factory=AnswerConfig)
    """The form of answers, for scorer `answer`."""

    @model_validator(mode="after")
    def _check_pairs(self) -> "PreferencesConfig":
        if self.chosen == "teacher" and not self.student_samples:
            raise ValueError(
                "chosen 'teacher' needs samples of the student, but student_samples is 0; set chosen: best"
            )
        if self.samples + self.student_samples < 2:
            raise ValueError("a pair needs two samples; raise samples or student_samples")
        if self.needs_logprobs and self.student_samples:
            raise ValueError(
                "scorer 'mean_logprob' compares samples of one model, but teacher and student generate; set "
                "student_samples to 0, or another scorer"
            )
        return self

    @property
    def writes_pairs(self) -> bool:
        return True

    @property
    def reads_student(self) -> bool:
        return self.student_samples > 0

    @property
    def reads_truth(self) -> bool:
        return self.chosen == "best" and self.scorer == "answer"

    @property
    def needs_logprobs(self) -> bool:
        return self.chosen == "best" and self.scorer == "mean_logprob"


class CustomSynthesisConfig(SynthesisSettings):
    """Your own recipe: a subclass of `rayk.Recipe`."""

    kind: Literal["custom"] = "custom"
    """The synthesis' kind."""
    path: ClassPath
    """The recipe's class as 'module:name'. The module may be a file next to the config file."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Your own options; the recipe reads them as `settings.options`."""
    own_prompts: bool = False
    """True if the recipe makes its own prompts, so that neither `data.train` nor `synthesis.prompts` is given."""
    pairs: bool = False
    """True if each row has a better and a worse answer, for method `preference`."""

    @property
    def makes_prompts(self) -> bool:
        return self.own_prompts

    @property
    def writes_pairs(self) -> bool:
        return self.pairs


SynthesisConfig = Annotated[
    ResponsesConfig
    | ChainOfThoughtConfig
    | SelfInstructConfig
    | MagpieConfig
    | AdversarialConfig
    | PreferencesConfig
    | CustomSynthesisConfig,
    Field(discriminator="kind"),
]
