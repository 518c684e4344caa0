import pytest
import torch

from rayk.config import TeacherConfig
from rayk.teachers import serve_teacher
from tests.tiny import tiny_model, tiny_tokenizer
from tests.training.rank_group import RankGroup


@pytest.fixture(scope="package")
def pair(tmp_path_factory):
    """Two ranks without Ray."""
    group = RankGroup(2, tmp_path_factory.mktemp("ranks"))
    yield group
    group.close()


@pytest.fixture
def broken(ray_cluster, tmp_path):
    """Settings of a served teacher that computes NaN for every row with an '8' in it."""
    tokenizer = tiny_tokenizer()
    model = tiny_model(seed=1, peaked=4.0)
    with torch.no_grad():
        model.get_input_embeddings().weight[tokenizer("8").input_ids[0]] = torch.nan
    model.save_pretrained(tmp_path / "broken")
    tokenizer.save_pretrained(tmp_path / "broken")
    settings = TeacherConfig(name="broken", model=str(tmp_path / "broken"), resources={"num_cpus": 0.25})
    with serve_teacher(settings):
        yield [{"name": "broken", "attach": True}]
