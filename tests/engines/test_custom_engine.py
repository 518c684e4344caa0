"""An engine of one's own: named by path or entry point, served by Ray Serve, and refused in one sentence."""

import importlib
import re

import pytest
import torch

from rayk.config import TeacherConfig
from rayk.config.support import TopK
from rayk.engines.build import build_engine
from rayk.errors import InputError
from tests.engines.bigrams import BigramEngine
from tests.engines.reference import sequence

TEXT = "the cat sat on the mat and the dog sat on the log"


def config_of(folder, path="tests.engines.bigrams:BigramEngine", options=None, **engine):
    engine = {"kind": "custom", "path": path, "options": options or {"text": TEXT}, **engine}
    return TeacherConfig(name="bigrams", model=folder, engine=engine, resources={"num_cpus": 0.1})


def test_options_reach_the_engine(tiny_teacher):
    engine = build_engine(config_of(tiny_teacher))
    assert isinstance(engine, BigramEngine)
    cat, mat = (engine.tokenizer(word).input_ids[0] for word in ("cat", "mat"))
    other = build_engine(config_of(tiny_teacher, options={"text": "cat mat"}))
    assert other.log_probs[cat].argmax() != engine.log_probs[cat].argmax() or cat == mat


def test_an_entry_point_names_an_engine(tiny_teacher, tmp_path, monkeypatch):
    info = tmp_path / "bigrams-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: bigrams\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[rayk.engines]\nbigram-counts = tests.engines.bigrams:BigramEngine\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    assert isinstance(build_engine(config_of(tiny_teacher, "bigram-counts")), BigramEngine)
    with pytest.raises(InputError, match="no installed package registers 'others'.*'rayk.engines'"):
        build_engine(config_of(tiny_teacher, "others"))


def test_a_file_in_the_current_folder_is_found(tiny_teacher, tmp_path, monkeypatch):
    (tmp_path / "my_engine.py").write_text("from tests.engines.bigrams import BigramEngine as Mine\n")
    monkeypatch.chdir(tmp_path)
    assert isinstance(build_engine(config_of(tiny_teacher, "my_engine:Mine")), BigramEngine)


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("no_such_file:Engine", "module 'no_such_file' cannot be imported: ModuleNotFoundError"),
        ("tests.engines.bigrams:Engine", "module 'tests.engines.bigrams' has no class 'Engine'"),
        ("tests.engines.bigrams:no_class", "is a function, not a class"),
        ("tests.engines.bigrams:WithoutWarmUp", "does not define 'warm_up'; add it"),
        ("tests.engines.bigrams:WithoutAsync", "write 'async def score'"),
        ("tests.engines.bigrams:WithoutInfo", "has no 'info'; set it to a rayk.engines.base.EngineInfo"),
        ("tests.engines.bigrams:WithoutSupports", "list those that 'score' returns, or set 'signals: false'"),
        ("tests.engines.bigrams:WithUnknownSupport", "lists the support 'everything' .*'topk', 'requested'"),
        ("tests.engines.bigrams:WithoutVerify", "does not define 'verify'"),
    ],
)
def test_an_engine_that_does_not_fit_is_refused_in_one_sentence(tiny_teacher, path, said):
    with pytest.raises(InputError, match=rf"^teachers.engine.path: .*{said}") as refusal:
        build_engine(config_of(tiny_teacher, path))
    assert "\n" not in str(refusal.value)


def test_errors_of_its_constructor_name_the_line(tiny_teacher):
    with pytest.raises(InputError, match=r"cannot be created: KeyError: 'text' \(bigrams.py, line \d+\)"):
        build_engine(config_of(tiny_teacher, options={"other": 1}))


@pytest.mark.cluster
def test_a_custom_engine_is_served(ray_cluster, tiny_teacher, monkeypatch, caplog):
    from rayk.teachers import serve_teacher

    monkeypatch.setattr("rayk.serving.application._LOADING_REPORT_SECONDS", 0.2)

    sequences = [sequence(20, 1), sequence(30, 2)]
    engine = build_engine(config_of(tiny_teacher))
    with serve_teacher(config_of(tiny_teacher)) as teacher:
        signals = teacher.score(sequences, TopK(5))
        [completion] = teacher.generate(["the cat sat on"], max_new_tokens=6)
    before = torch.from_numpy(sequences[0].input_ids[:-1][sequences[0].counted[1:]].astype(int))
    likeliest = engine.log_probs[before].topk(5)
    count = sequences[0].counted_tokens
    torch.testing.assert_close(signals.logprobs[:count], likeliest.values, atol=2e-3, rtol=1e-3)
    assert len(completion.token_ids) == 6
    assert completion.text and completion.finish_reason == "length"
    assert re.search(r"eacher.*: 0 of 1 replicas are ready after \d+ s. The model is", caplog.text)


@pytest.mark.cluster
def test_a_wrong_engine_stops_serving_with_its_sentence(ray_cluster, tiny_teacher, monkeypatch, caplog):
    from rayk.teachers import serve_teacher

    monkeypatch.setattr("rayk.serving.application._LOADING_REPORT_SECONDS", 0.2)
    config = config_of(tiny_teacher, "tests.engines.bigrams:WithoutWarmUp")
    with pytest.raises(InputError, match="did not start: .*does not define 'warm_up'"), serve_teacher(config):
        pass
    report = next(message for message in caplog.messages if "failed to start" in message)
    assert re.search(r"0 of 1 replicas are ready after \d+ s. A replica failed .*: teachers.engine.path: ", report)
    assert "Traceback" not in report
