"""From an image folder by way of records to figures: the same as from the folder."""

import json

from tests.conftest import ROOT, TINY_KEYS
from tests.data.test_records import write_folder

RECIPE = f"--config={ROOT / 'config/imagefolder/cvt_nano_64.yaml'}"


def test_training_and_evaluation_on_records_equal_the_folders(tmp_path, run_here):
    write_folder(tmp_path / "photos", train=8, val=5)
    command = ("tools.records", "--src=photos", "--dst=packed", "--images_per_shard=5")
    done = run_here(*command)
    assert done.returncode == 0, done.stderr
    keys = [*TINY_KEYS, "--training.epochs=2", "--model.image_size=32", "--training.batch_size=8"]
    keys += ["--evaluation.batch_size=4", "--data.workers=1", "--runtime.mode=pynative"]
    metrics = {}
    for source, path in (("imagefolder", "photos"), ("mindrecord", "packed")):
        data = [f"--data.source={source}", f"--data.path={path}", f"--output={source}"]
        done = run_here("train.py", RECIPE, *keys, *data)
        assert done.returncode == 0, done.stderr
        rows = (tmp_path / source / "metrics.jsonl").read_text().splitlines()
        metrics[source] = [json.loads(row) for row in rows]
    for folder, records in zip(metrics["imagefolder"], metrics["mindrecord"]):
        same = ("step", "train_loss", "top1", "loss")
        assert {key: folder[key] for key in same} == {key: records[key] for key in same}
    assert len(metrics["mindrecord"]) == 2

    weights = "--ckpt=imagefolder/checkpoints/last.ckpt"
    figures = []
    for data in ([], ["--data.source=mindrecord", "--data.path=packed"]):
        done = run_here("eval.py", weights, *data, "--json=figures.json")
        assert done.returncode == 0, done.stderr
        figures.append(json.loads((tmp_path / "figures.json").read_text()))
    for key in ("images", "top1", "top5", "loss"):
        assert figures[0][key] == figures[1][key]
    assert figures[1]["images"] == 15

    (tmp_path / "packed/train/00001.mindrecord").unlink()
    data = ["--data.source=mindrecord", "--data.path=packed", "--output=new"]
    done = run_here("train.py", RECIPE, *keys, *data)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "train/00001.mindrecord: the shard is missing" in done.stderr
    assert not (tmp_path / "new").exists()
