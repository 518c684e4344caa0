"""Methods and divergences of the user's, named by path: they run, also by `rayk run`, and errors are one sentence."""

import sys

import pytest
import yaml

from rayk.config import parse_config
from rayk.errors import InputError, RaykError
from rayk.methods import resolve_method
from rayk.run import distill
from tests import runs

LOSS = '''
def hellinger(log_p, log_q, power=0.5):
    """1 − Σ √(p·q)."""
    return 1 - (power * (log_p + log_q)).exp().sum(-1)


def total_variation(log_p, log_q, has_tail):
    assert has_tail  # with hidden states: the padding of the embedding
    return 0.5 * (log_p.exp() - log_q.exp()).abs().sum(-1)


def alone(log_q):
    return log_q.sum(-1)


def averaged(log_p, log_q):
    return (log_p - log_q).mean()
'''

METHOD = '''
import torch

import rayk
from rayk import Experience, Loss, Method, OnPolicyMethod
from rayk.losses import linear_cross_entropy, linear_divergence


class Plain(Method):
    """Cross-entropy, as `supervised`."""

    async def prepare(self, batch):
        assert len(batch.sequences[0].input_ids) == len(batch.sequences[0].counted)
        assert batch.counted_tokens == len(batch.targets) == len(batch.counted(batch.input_ids))
        return Experience(batch)

    def loss(self, student, experience):
        batch = experience.batch
        return Loss(linear_cross_entropy(student.hidden(batch), student.head, batch.targets))


class Weighted(Method):
    """Logit distillation, weighed by the teacher's confidence."""

    async def prepare(self, batch):
        return Experience(batch, await self.teacher.ascore(batch, self.settings.support))

    def loss(self, student, experience):
        signals = experience.signals
        kl = linear_divergence(student.hidden(experience.batch), student.head, signals, "forward_kl")
        weight = (self.settings.options["gamma"] * signals.target_logprobs).exp()
        return Loss(weight * kl, {"forward_kl": kl, "weight": weight})


class Generated(OnPolicyMethod):
    """Reverse KL on the student's own completions."""

    async def prepare(self, batch):
        return Experience(batch, await self.teacher.ascore(batch, self.settings.support))

    def loss(self, student, experience):
        return Loss(linear_divergence(
            student.hidden(experience.batch), student.head, experience.signals, "reverse_kl"
        ))


class Averaged(Plain):
    def loss(self, student, experience):
        return Loss(super().loss(student, experience).per_token.mean())


class OddTerm(Plain):
    def loss(self, student, experience):
        loss = super().loss(student, experience)
        return Loss(loss.per_token, {"odd": loss.per_token.sum()})


class Detached(Plain):
    def loss(self, student, experience):
        return Loss(super().loss(student, experience).per_token.detach())


class Infinite(Plain):
    def loss(self, student, experience):
        return Loss(super().loss(student, experience).per_token / 0)


class Unprepared(Plain):
    async def prepare(self, batch):
        return batch


class Raising(Plain):
    async def prepare(self, batch):
        return {}["missing"]


class Precomputing(Plain):
    """Fails on the worker that has the first row."""

    def precompute(self, student, batches, gather):
        rows = [row.where for batch in batches for row in batch.sequences]
        if any(where.endswith("line 1") for where in rows):
            raise ValueError("no reference for line 1")
        gather(len(rows))


class Half(Method):
    async def prepare(self, batch):
        return Experience(batch)


class Alone:
    pass


CONSTANT = 3
'''


@pytest.fixture(autouse=True)
def user_folder(tmp_path, monkeypatch):
    """The current folder, with the user's modules; none of it is importable before or after."""
    (tmp_path / "user_loss.py").write_text(LOSS)
    (tmp_path / "user_method.py").write_text(METHOD)
    monkeypatch.chdir(tmp_path)
    path = list(sys.path)
    yield tmp_path
    sys.path[:] = path
    for name in ("user_loss", "user_method"):
        sys.modules.pop(name, None)


def custom(folder, student, name, **method):
    method = {"kind": "custom", "path": f"user_method:{name}", "support": None} | method
    values = runs.settings(folder, student, method, steps=3)
    return values if method["support"] or method.get("rollouts") else values | {"teachers": []}


@pytest.mark.parametrize(("name", "said"), [
    ("user_method:Missing", "has no class 'Missing'"),
    ("no_such_module:Plain", "module 'no_such_module' cannot be imported: ModuleNotFoundError"),
    ("user_method:Alone", "'user_method:Alone' is not a subclass of rayk.Method"),
    ("user_method:CONSTANT", "'user_method:CONSTANT' is not a subclass of rayk.Method"),
    ("user_method:Half", "class 'user_method:Half' does not define 'loss'"),
    ("user_method:Generated", "generates completions, but method.rollouts is false; set method.rollouts: true"),
    ("no_such_method", "no installed package registers 'no_such_method' as entry point in group 'rayk.methods'"),
])  # fmt: skip
def test_a_wrong_path_is_refused_before_the_run_starts(tmp_path, tiny_student, name, said):
    values = custom(tmp_path, tiny_student, "Plain", path=name)
    with pytest.raises(InputError, match=r"^method\.path: .*") as refused:
        distill(parse_config(values))
    assert said in str(refused.value) and not (tmp_path / "run").exists()


def test_a_method_without_rollouts_must_not_be_declared_with_them(user_folder, tiny_student):
    config = {"kind": "custom", "path": "user_method:Plain", "rollouts": True, "support": None}
    values = runs.settings(user_folder, tiny_student, config) | {"teachers": [], "rollouts": {"max_new_tokens": 4}}
    with pytest.raises(InputError, match="generates no completions, but method.rollouts is true; derive it from"):
        resolve_method(parse_config(values).method)


@pytest.mark.parametrize(("name", "said"), [
    ("user_loss:missing", "has no function 'missing'"),
    ("missing:hellinger", "module 'missing' cannot be imported"),
    ({"name": "user_loss:averaged", "power": 1.0}, "The divergence 'averaged' has no parameter 'power'"),
    ("user_loss:averaged", "'averaged' must return one number per token, a tensor [tokens] of shape [2] here, but it"),
    ("user_loss:alone", "The divergence 'alone' cannot be called with (log_p, log_q): alone() takes 1 positional"),
])  # fmt: skip
def test_a_wrong_divergence_is_refused_before_the_run_starts(tmp_path, tiny_student, tiny_teacher, name, said):
    values = runs.settings(tmp_path, tiny_student, {"kind": "logit_kd", "divergence": name})
    values["teachers"] = [{"model": tiny_teacher}]
    with pytest.raises(InputError) as refused:
        distill(parse_config(values))
    assert said in str(refused.value) and not (tmp_path / "run").exists()


def test_a_custom_method_equals_the_built_in_one(tmp_path, tiny_student):
    for name, method in (
        ("own", {"kind": "custom", "path": "user_method:Plain", "support": None}),
        ("built_in", "supervised"),
    ):
        (tmp_path / name).mkdir()
        distill(parse_config(runs.settings(tmp_path / name, tiny_student, method, steps=3) | {"teachers": []}))
    runs.assert_same_learning(tmp_path / "own" / "run", tmp_path / "built_in" / "run", 1e-6)


@pytest.mark.parametrize(("name", "said"), [
    ("Averaged", r"'per_token' of shape \[\], but this micro-batch has \d+ counted tokens"),
    ("OddTerm", r"'odd' of shape \[\], but this micro-batch has \d+ counted tokens"),
    ("Detached", "The method's loss has no gradient"),
    ("Infinite", "The method's loss is not finite in the first step"),
    ("Unprepared", "Unprepared.prepare must return a rayk.Experience, but it returned Batch"),
    ("Raising", r"KeyError: 'missing' \(.*user_method.py, line \d+\)"),
])  # fmt: skip
def test_a_wrong_result_stops_the_run_in_one_sentence(tmp_path, tiny_student, name, said):
    with pytest.raises(RaykError, match=said) as refused:
        distill(parse_config(custom(tmp_path, tiny_student, name)))
    assert "\n" not in str(refused.value)


def test_a_custom_divergence_equals_the_built_in_one(tmp_path, tiny_student, served):
    """With signals that have a tail, and with hidden states; the metric has the function's name."""
    for support in ({"kind": "topk", "k": 8}, {"kind": "hidden"}):
        for name in ("user_loss:total_variation", "total_variation"):
            folder = tmp_path / support["kind"] / name.replace(":", "_")
            folder.mkdir(parents=True)
            method = {"kind": "logit_kd", "divergence": name, "support": support}
            distill(parse_config(runs.settings(folder, tiny_student, method, steps=3)))
        own, built_in = (path / "run" for path in sorted((tmp_path / support["kind"]).iterdir(), reverse=True))
        runs.assert_same_learning(own, built_in, 1e-6)
        assert runs.curve(own, "total_variation") == runs.curve(built_in, "total_variation")


def test_a_custom_divergence_takes_its_own_options(tmp_path, tiny_student, served):
    for name, options in (("half", {}), ("third", {"power": 0.3})):
        (tmp_path / name).mkdir()
        method = {"kind": "logit_kd", "divergence": {"name": "user_loss:hellinger", **options}}
        distill(parse_config(runs.settings(tmp_path / name, tiny_student, method, steps=2)))
    assert runs.curve(tmp_path / "half" / "run") != runs.curve(tmp_path / "third" / "run")


def test_a_custom_method_may_generate(tmp_path, tiny_student, served):
    """The defaults of OnPolicyMethod: the student completes every row, in the policy's groups."""
    method = {"kind": "custom", "path": "user_method:Generated", "rollouts": True, "support": {"kind": "topk", "k": 8}}
    for name, kind in (("own", method), ("built_in", {"kind": "on_policy", "support": {"kind": "topk", "k": 8}})):
        (tmp_path / name).mkdir()
        values = runs.settings(tmp_path / name, tiny_student, kind, steps=3)
        distill(parse_config(values | {"rollouts": {"max_new_tokens": 12}}))
    runs.assert_same_learning(tmp_path / "own" / "run", tmp_path / "built_in" / "run", 1e-6)


@pytest.mark.long
def test_a_failure_of_one_worker_before_the_first_step_stops_all(tmp_path, tiny_student, ray_cluster):
    values = custom(tmp_path, tiny_student, "Precomputing")
    values["training"]["workers"] = 2
    with pytest.raises(RaykError, match="ValueError: no reference for line 1"):
        distill(parse_config(values))


@pytest.mark.cluster
@pytest.mark.parametrize("method", [
    {"kind": "custom", "path": "user_method:Weighted", "options": {"gamma": 0.5}},
    pytest.param({"kind": "logit_kd", "divergence": "user_loss:hellinger"}, marks=pytest.mark.nightly),
], ids=["method", "divergence"])  # fmt: skip
@pytest.mark.long
def test_rayk_run_finds_the_users_modules_in_its_workers(tmp_path, tiny_student, tiny_teacher, method):
    """Two workers, in separate processes; the modules are next to the config file or in the current folder, only."""
    folder = tmp_path / "elsewhere" if method["kind"] == "custom" else tmp_path
    folder.mkdir(exist_ok=True)
    for module in ("user_loss.py", "user_method.py"):
        (tmp_path / module).rename(folder / module)
    values = runs.settings(tmp_path, tiny_student, method, workers=2, steps=2)
    values["teachers"] = [{"model": tiny_teacher, "resources": {"num_cpus": 0.5}}]
    (folder / "run.yaml").write_text(yaml.safe_dump(values))
    done = runs.run_rayk("run", folder / "run.yaml")
    assert done.returncode == 0, done.stderr
    assert runs.curve(tmp_path / "run", "step") == [1, 2]
    assert ("weight" if method["kind"] == "custom" else "hellinger") in runs.metrics(tmp_path / "run")[0]
