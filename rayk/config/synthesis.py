"""What teachers write for the student to learn from, and how; told apart by `kind`."""

import string
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from rayk.config.base import FUNCTION_PATTERN, AnswerPattern, ClassPath, Positive, Settings
from rayk.config.data import DataSource
from rayk.config.filters import (
    EndingFilterConfig,
    FilterConfig,
    LengthFilterConfig,
    NearDuplicatesFilterConfig,
    TextFilterConfig,
    TruncatedFilterConfig,
)
from rayk.config.teachers import (
    Replicas,
    Resources,
    TransformersEngineConfig,
    VLLMEngineConfig,
    as_replicas,
    on_transformers,
)

AnswerType = Literal["number", "choice", "yes_no", "date", "free"]


class SamplingConfig(Settings):
    """How the teacher writes."""

    max_new_tokens: Positive = 256
    temperature: Annotated[float, Field(ge=0)] = 0.7
    """0: greedy."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    stop: list[Annotated[str, Field(min_length=1)]] = Field(default_factory=list)
    """Texts that end a completion and are no part of it, such as "\\nQ:" for a base model that would go on asking."""


class AnswerConfig(Settings):
    """What counts as an answer, and where a row has the right one."""

    type: AnswerType = "free"
    """What an answer looks like in what the teacher writes. `choice`: one of the letters `choices`; `date`: with the
    month before the day where both are numbers; `free`: text up to the end of its line."""
    choices: Annotated[str, Field(pattern=r"^[A-Z]{2,}$")] = "ABCDE"
    field: str = "answer"
    """The row's field with the truth."""
    pattern: AnswerPattern | None = None
    """A regular expression with one group that finds the answer in that field (the last match counts), such as
    '#### (.+)'; by default the whole field."""


Scorer = Annotated[str, Field(pattern=rf"^(mean_logprob|answer|{FUNCTION_PATTERN[1:-1]})$")]


def _whole_ones() -> list[FilterConfig]:
    return [TruncatedFilterConfig()]


class SynthesisSettings(Settings):
    """What all recipes share."""

    kind: str
    teacher: str | None = None
    """Which of `teachers` writes; by default the first. Unless the method asks it for signals too, it comes down before
    training, and may have a tokenizer of its own."""
    prompts: DataSource | None = None
    """The rows to write for, instead of `data.train`; only their prompts are read, and the truth where it is used."""
    chat: bool = False
    """Wrap what the teacher is asked in its tokenizer's chat template, as a user's message. An endpoint (engine kind
    `openai`) has its own `engine.chat`."""
    sampling: SamplingConfig = Field(default_factory=SamplingConfig)
    filters: list[FilterConfig] = Field(default_factory=_whole_ones)
    """What is left out of what was written, in this order, but a `judge` after those of text alone, and those that
    compare rows with each other last, after `keep`; by default what was cut at `sampling.max_new_tokens`, for the
    student would learn to stop so."""
    in_flight: Positive = 64
    """Prompts asked for at once."""

    @property
    def reads_truth(self) -> bool:
        """Whether the rows' right answers are needed."""
        return False

    @property
    def makes_prompts(self) -> bool:
        """Whether the teacher makes up the prompts too, so that no rows are given."""
        return False

    @property
    def needs_logprobs(self) -> bool:
        """Whether the teacher must tell the log-probs of what it writes."""
        return False

    @property
    def writes_pairs(self) -> bool:
        """Whether a row is a prompt with a better and a worse answer, for method `preference`."""
        return False

    @property
    def reads_student(self) -> bool:
        """Whether the rows depend on the student, so that there can be `rounds`."""
        return False

    def asks_student(self, number: int) -> bool:
        """Whether the student, as it is when round `number` (from 0) begins, has to answer in it."""
        return self.reads_student


class ServedStudentConfig(Settings):
    """How the student, as it is when a round begins, is served to be asked; it comes down before training."""

    engine: Annotated[
        Annotated[TransformersEngineConfig | VLLMEngineConfig, Field(discriminator="kind")],
        BeforeValidator(on_transformers),
    ] = Field(default_factory=TransformersEngineConfig)
    """By default `kind: transformers`."""
    replicas: Annotated[Replicas, BeforeValidator(as_replicas)] = Field(default_factory=Replicas)
    resources: Resources = Field(default_factory=Resources)
    deadline_seconds: Annotated[float, Field(gt=0)] = 300.0
    """How long one request may take, retries and replica restarts included, before the run stops."""


class StudentSynthesisConfig(SynthesisSettings):
    """What recipes share whose rows depend on the student."""

    student: ServedStudentConfig = Field(default_factory=ServedStudentConfig)
    """How it is served while it writes."""

    @property
    def reads_student(self) -> bool:
        return True


class ResponsesConfig(SynthesisSettings):
    """The teacher's answers to the rows' prompts (SeqKD)."""

    kind: Literal["responses"] = "responses"
    samples: Positive = 1
    """Completions asked for each prompt."""
    keep: Literal["all", "best"] = "all"
    """All samples of a prompt, or the one that `scorer` likes best (the first of equals)."""
    scorer: Scorer = "mean_logprob"
    """For `keep: best`: the teacher's own `mean_logprob`; `answer`: a right one, and no sample where none is right; or
    your function `module:name`, called with (prompt, completion, row), which returns a number, higher is better."""
    answer: AnswerConfig = Field(default_factory=AnswerConfig)
    """For scorer `answer`."""

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


class ReasoningConfig(SamplingConfig):
    """How rationales are written."""

    max_new_tokens: Positive = 128


class ChainOfThoughtConfig(SynthesisSettings):
    """The teacher's rationales that end in the right answer (Fine-tune-CoT)."""

    kind: Literal["chain_of_thought"] = "chain_of_thought"
    sampling: ReasoningConfig = Field(default_factory=ReasoningConfig)
    rationales: Positive = 1
    """D: rationales asked for each question."""
    answer: AnswerConfig = Field(default_factory=AnswerConfig)
    keep: Literal["correct", "answered"] = "correct"
    """Rationales whose answer is the row's; or all that have an answer, where rows have no truth."""
    rationale_template: Annotated[str, _template_with("question")] = "Q: {question}\nA: Let's think step by step."
    """The first call."""
    answer_template: Annotated[str, _template_with("asked", "rationale")] = (
        "{asked} {rationale}\nTherefore, the answer is"
    )
    """The second call; {asked} is the first."""
    answer_tokens: Positive = 32
    """Longest answer of the second call, which is greedy."""
    student_format: Literal["delimiters", "plain"] = "delimiters"
    """What the student learns: `<question> ###` and `<rationale> --> <answer>`; or the question as it is and
    `<rationale>\\nTherefore, the answer is <answer>.`, which suits `data.chat_template: true`."""

    @property
    def reads_truth(self) -> bool:
        return self.keep == "correct"


class ListingConfig(SamplingConfig):
    """How lists of new instructions are written."""

    max_new_tokens: Positive = 1024
    top_p: Annotated[float, Field(gt=0, le=1)] = 0.5


class SelfInstructConfig(SynthesisSettings):
    """Tasks with inputs and answers that the teacher makes up itself (Self-Instruct); a base model will do."""

    kind: Literal["self_instruct"] = "self_instruct"
    seed_tasks: str | None = None
    """The tasks it starts from, JSONL in the paper's format: {"instruction": …, "is_classification": true or false,
    "instances": [{"input": …, "output": …}, …]}. By default 70 that were written for rayk."""
    instructions: Positive = 1000
    """How many to make up; fewer where the teacher has no new ideas any more. Each becomes up to 5 rows."""
    batch: Positive = 16
    """Lists of 8 new instructions asked for before they join the pool."""
    sampling: ListingConfig = Field(default_factory=ListingConfig)
    """Of the lists; whether a task is a classification and its instances are written greedily."""
    instance_tokens: Positive = 350
    """Longest text of a task's instances."""
    blacklist: tuple[Annotated[str, Field(min_length=1)], ...] = (
        "image", "images", "graph", "graphs", "picture", "pictures", "file", "files", "map", "maps", "draw", "plot",
        "go to",
    )  # fmt: skip
    """Words of instructions that a model of text alone cannot follow; the paper's. [] for none."""
    filters: list[FilterConfig] = Field(default_factory=list)
    """Of the rows, beside the recipe's own rules. A cut answer's last instance is left out anyway, but `truncated`
    would leave out the whole ones before it too."""

    @property
    def makes_prompts(self) -> bool:
        return True


class DrawingConfig(SamplingConfig):
    """How instructions are drawn: as the model has them, without truncation."""

    max_new_tokens: Positive = 2048
    temperature: Annotated[float, Field(ge=0)] = 1.0


class RespondingConfig(SamplingConfig):
    """How they are answered."""

    max_new_tokens: Positive = 4096
    temperature: Annotated[float, Field(ge=0)] = 0.0


def _instructions_worth_answering() -> list[TextFilterConfig]:
    return [LengthFilterConfig(minimum=3), EndingFilterConfig(), NearDuplicatesFilterConfig(fields=("prompt",))]


class MagpieConfig(SynthesisSettings):
    """Instructions that a chat model writes when it is given the beginning of a user's turn, and its answers to them
    (Magpie)."""

    kind: Literal["magpie"] = "magpie"
    instructions: Positive = 1000
    """How many to draw; those that pass `instruction_filters` are answered."""
    system: Annotated[str, Field(min_length=1)] | None = None
    """A system prompt before the instructions, such as one that names a subject; the answers are given without it."""
    tokenizer: str | None = None
    """Whose chat template is used, a local folder or a hub id; by default the teacher's own. For an endpoint (engine
    kind `openai`) it is needed, and `engine.chat: false`: a beginning can only go through plain completions."""
    sampling: DrawingConfig = Field(default_factory=DrawingConfig)
    """Of the instructions."""
    responses: RespondingConfig = Field(default_factory=RespondingConfig)
    role_words: tuple[Annotated[str, Field(min_length=1)], ...] = ("assistant",)
    """End an instruction too, for a model may write the next role's name without ending the turn. Where one stands
    amid a line, the instruction is left out. [] for none."""
    stop_at_newline: bool = False
    """Instructions of one line."""
    instruction_filters: list[TextFilterConfig] = Field(default_factory=_instructions_worth_answering)
    """What is left out of the instructions before they are answered, whichever field a filter names."""
    keep_longest: Positive | None = None
    """Of the rows that pass `filters`, only so many with the longest answers, in characters."""

    @property
    def makes_prompts(self) -> bool:
        return True

    @model_validator(mode="after")
    def _chats_by_itself(self) -> "MagpieConfig":
        if self.chat:
            raise ValueError("synthesis.chat: 'magpie' always goes by the teacher's chat template; leave it out")
        return self


class AnsweringConfig(SamplingConfig):
    """How instructions are answered."""

    max_new_tokens: Positive = 1024


class RefereeingConfig(SamplingConfig):
    """How answers are compared."""

    max_new_tokens: Positive = 512
    temperature: Annotated[float, Field(ge=0)] = 0.2


class AdversarialConfig(StudentSynthesisConfig):
    """Round by round new instructions where the student is behind its teacher (Lion); with `rounds`."""

    kind: Literal["adversarial"] = "adversarial"
    referee: str | None = None
    """Which of `teachers` compares answers; by default the one that writes."""
    sampling: AnsweringConfig = Field(default_factory=AnsweringConfig)
    """Of answers, the student's too."""
    referee_sampling: RefereeingConfig = Field(default_factory=RefereeingConfig)
    threshold: float = 1.0
    """An instruction is hard if the teacher's answer scores so many points of 10 more than the student's, else easy."""
    instructions: Positive = 3000
    """How many to make up in each round from hard ones; fewer where the teacher has no new ideas any more, or where
    there are none."""
    easy_instructions: Annotated[int, Field(ge=0)] | None = None
    """How many from easy ones; by default as many as from hard ones. 0: none."""
    batch: Positive = 64
    """Instructions of a kind asked for before those that pass join the pool."""
    instruction_temperature: Annotated[float, Field(ge=0)] = 1.0
    instruction_tokens_per_word: Positive = 4
    """Longest new instruction, for each word of the one it is made from; never fewer than 32 tokens."""
    blacklist: tuple[Annotated[str, Field(min_length=1)], ...] = (
        "instruction", "instructions", "given prompt", "new prompt",
    )  # fmt: skip
    """Words of instructions that talk about what the teacher was asked for. [] for none."""
    hard_template: Annotated[str, _template_with("instruction")] | None = None
    """How to ask for an instruction of the same domain and type as a hard one; by default rayk's own, for base models
    with examples, for chat models without."""
    easy_template: Annotated[str, _template_with("instruction")] | None = None
    """How to ask for a rarer instruction of the same domain as an easy one."""
    referee_template: Annotated[str, _template_with("instruction", "first", "second")] | None = None
    """How to ask for the scores of two answers, 'A' and 'B'. Understood are lines such as 'Score of A: 8', the last of
    each, and otherwise the last line that has two numbers and nothing else; from 1 to 10."""

    @property
    def instructions_of(self) -> dict[str, int]:
        """How many to make up in each round, by the kind of what they are made from."""
        easy = self.instructions if self.easy_instructions is None else self.easy_instructions
        return {"hard": self.instructions, "easy": easy}

    def asks_student(self, number: int) -> bool:
        return number > 0


class PreferencesConfig(StudentSynthesisConfig):
    """A better and a worse answer to each prompt, for method `preference` (DPO); what `filters` look at as `completion`
    is the better one, `chosen`, the other one is `rejected`."""

    kind: Literal["preferences"] = "preferences"
    chosen: Literal["teacher", "best"] = "teacher"
    """The teacher's answer is preferred to the student's; or of all samples the one that `scorer` likes best to the one
    it likes least."""
    samples: Positive = 1
    """The teacher's for each prompt."""
    student_samples: Annotated[int, Field(ge=0)] = 1
    """The student's, as it is when the round begins. With `chosen: teacher` each side's are paired in turn, so that
    there are as many pairs as the side with more of them has samples."""
    student_sampling: SamplingConfig | None = None
    """How the student writes, whose prompts are as `data` lays them out; by default as the teacher."""
    scorer: Scorer = "answer"
    """For `chosen: best`: whether the `answer` is right; the writer's own `mean_logprob`, where the teacher alone
    writes; or your function `module:name`, called with (prompt, completion, row), which returns a number."""
    answer: AnswerConfig = Field(default_factory=AnswerConfig)
    """For scorer `answer`."""

    @model_validator(mode="after")
    def _can_be_paired(self) -> "PreferencesConfig":
        if self.chosen == "teacher" and not self.student_samples:
            raise ValueError("student_samples is 0, so there is nothing to prefer the teacher to; set chosen: best")
        if self.samples + self.student_samples < 2:
            raise ValueError("a pair takes two samples; raise samples or student_samples")
        if self.needs_logprobs and self.student_samples:
            raise ValueError(
                "scorer 'mean_logprob' compares what one model wrote, but teacher and student write; set "
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
    """A recipe of your own: a subclass of `rayk.Recipe`."""

    kind: Literal["custom"] = "custom"
    path: ClassPath
    """The recipe's class as 'module:name'; the module may also be a file in the folder where rayk was started."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Passed to the recipe as `settings.options`."""
    own_prompts: bool = False
    """Whether the recipe makes its own prompts, so that neither `data.train` nor `synthesis.prompts` is given."""
    pairs: bool = False
    """Whether each row is a prompt with a better and a worse answer, for method `preference`."""

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
