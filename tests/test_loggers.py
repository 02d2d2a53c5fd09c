"""What W&B is told, read back from an offline run's file with wandb's own reader."""

import json


def test_wandb_offline(run, workplace):
    from wandb.proto import wandb_internal_pb2
    from wandb.sdk.internal.datastore import DataStore

    status, _, err = run("distill.py", "experiment=smoke", "steps.plan=[4,2]", "logger=wandb", "name=watched")
    assert status == 0, err
    (file,) = (workplace / "outputs" / "watched" / "wandb").glob("offline-run-*/run-*.wandb")
    store = DataStore()
    store.open_for_scan(str(file))
    keys, artifacts, config = set(), [], set()
    while (data := store.scan_data()) is not None:
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        keys |= {"/".join(item.nested_key) or item.key for item in record.history.item}
        config |= {item.key for item in record.run.config.update} | {item.key for item in record.config.update}
        if record.request.log_artifact.artifact.name:
            artifacts.append(record.request.log_artifact.artifact)
        elif record.artifact.name:
            artifacts.append(record.artifact)
    for name in ("loss", "learning_rate", "fid_classifier", "samples", "loss_by_logsnr/0_5"):
        assert {f"teacher/{name}", f"steps_0002/{name}"} <= keys
    assert {"summary", "comparison"} <= keys
    assert {"parameterization", "steps", "seed"} <= config
    described = {a.name: json.loads(a.metadata) for a in artifacts if a.type == "denoiser"}
    assert described["watched-teacher"]["parent"] is None
    assert described["watched-steps_0002"]["parent"] == "teacher"
