"""Folders at URIs: checkpoints, the signal cache and copied models in an S3 bucket."""

import pytest
import torch

from rayk.config.paths import place_below, place_beside
from rayk.errors import InputError
from rayk.storage.places import check_place, copy_folder, open_place
from rayk.storage.segments import KEY_BYTES, SegmentStore
from rayk.training.checkpoint import CheckpointStore
from tests.checkpoints import SmallRun
from tests.s3 import PASSWORD, USER

KEY = b"k" * KEY_BYTES


@pytest.mark.parametrize(
    ("place", "below", "beside"),
    [
        ("/a/b/", "/a/b/01", "/a/b-x"), ("a?b", "a?b/01", "a?b-x"), ("s3://b/c/", "s3://b/c/01", "s3://b/c-x"),
        ("s3://b/c?region=x&scheme=http", "s3://b/c/01?region=x&scheme=http", "s3://b/c-x?region=x&scheme=http"),
    ],
)  # fmt: skip
def test_names_are_added_before_the_query_of_a_uri(place, below, beside):
    assert (place_below(place, "01"), place_beside(place, "-x")) == (below, beside)


def test_run_continues_from_the_last_whole_checkpoint_in_a_bucket(s3):
    run = SmallRun(s3.uri("killed"))
    assert run.checkpoints.restore() == (0, True)
    run.train(2)
    run.save(2)
    whole = {name: tensor.clone() for name, tensor in run.module.state_dict().items()}
    run.train()
    run.save(4)
    [manifest] = [name for name in s3.names("killed/step-00000004") if name.endswith("manifest.json")]
    [shard] = [name for name in s3.names("killed/step-00000004") if ".shard-" in name]
    s3.files.delete_file(f"bucket/killed/step-00000004/{manifest}")  # killed before the manifest was written
    assert CheckpointStore(s3.uri("killed")).steps() == [2]
    again = SmallRun(s3.uri("killed"), seed=1, keep=1)
    assert again.checkpoints.restore() == (2, True)
    assert all(torch.equal(tensor, whole[name]) for name, tensor in again.module.state_dict().items())
    again.save(3)
    assert [name for name in s3.names("killed") if shard in name or "step-00000002" in name] == []
    run.train()
    with pytest.raises(Exception, match="Another process has continued this run") as stopped:
        run.save(5)  # the older process is not dead, only slow
    assert PASSWORD not in str(stopped.value) and USER not in str(stopped.value)
    assert CheckpointStore(s3.uri("killed")).steps() == [3]


def test_damaged_checkpoint_in_a_bucket_is_skipped(s3):
    run = SmallRun(s3.uri("damaged"))
    run.checkpoints.restore()
    for step in (1, 2):
        run.train()
        run.save(step)
    [shard] = [name for name in s3.names("damaged/step-00000002") if ".shard-" in name]
    data = s3.read(f"damaged/step-00000002/{shard}")
    s3.write(f"damaged/step-00000002/{shard}", data[:-1])
    assert SmallRun(s3.uri("damaged"), seed=1).checkpoints.restore()[0] == 1


def test_signal_cache_in_a_bucket(s3):
    first = SegmentStore(s3.uri("cache"))
    first.add({KEY: b"signal"})
    first.flush()
    assert SegmentStore(s3.uri("cache")).read([KEY]) == {KEY: b"signal"}
    assert PASSWORD not in first.place


def test_a_copied_folder_is_whole_or_lacks_its_last_file(s3, tmp_path, monkeypatch):
    (tmp_path / "sub").mkdir()
    for name in ("config.json", "weights", "sub/part"):
        (tmp_path / name).write_text(name)
    copy_folder(tmp_path, s3.uri("model"), "config.json")
    assert s3.names("model") == ["config.json", "sub/part", "weights"]
    (tmp_path / "weights").rename(tmp_path / "weights-2")
    copy_folder(tmp_path, s3.uri("model"), "config.json")
    assert s3.names("model") == ["config.json", "sub/part", "weights-2"]
    monkeypatch.setattr("shutil.copyfileobj", lambda *_: (_ for _ in ()).throw(OSError("the connection was lost")))
    with pytest.raises(OSError, match="lost"):
        copy_folder(tmp_path, s3.uri("model"), "config.json")
    assert "config.json" not in s3.names("model")


def test_places_that_cannot_be_used_are_refused_without_their_credentials(s3):
    check_place(s3.uri("checked"))
    assert s3.names("checked") == []
    wrong = s3.uri("x").replace("@bucket", "@no-such-bucket")
    for use in (check_place, lambda place: CheckpointStore(place).register(), SegmentStore):
        with pytest.raises((OSError, InputError)) as caught:
            use(wrong)
        assert PASSWORD not in str(caught.value) and "Zq81" not in str(caught.value)
    with pytest.raises(ValueError) as caught:
        open_place(f"s3://{USER}:{PASSWORD}@bucket:x/y")  # not escaped
    assert PASSWORD not in str(caught.value) and USER not in str(caught.value)
