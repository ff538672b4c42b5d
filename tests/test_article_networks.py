"""The comparison of the article networks: cases, equal seconds, trainings that are kept."""
import numpy as np
import pytest

from medimg.experiments import article_networks as a
from medimg.experiments.protocol import Run
from medimg.models.networks import build_model


def toy(n=48):
    rng = np.random.default_rng(0)
    y = np.arange(n) % 2
    x = (rng.normal(size=(n, 6)) + 2 * y[:, None]).astype("float32")
    return a.Contest(("toy", "ab"), {"mlp-28": (x, np.asarray)}, y, np.array(["train"] * (n // 2) + ["val"] * (n // 4) + ["test"] * (n // 4)), ("no", "yes"))


def test_every_case_is_drawn_once_an_epoch_and_only_from_training():
    contest = toy()
    draw = a._draws(contest, "mlp-28", 8, seed=3)
    for epoch in range(2):
        seen = np.concatenate([draw(3 * epoch + k)[0] for k in range(3)])
        assert np.array_equal(np.sort(seen, axis=0), np.sort(contest.batch("mlp-28", contest.rows("train")), axis=0))
    assert np.array_equal(draw(4)[0], draw(4)[0]) and not np.array_equal(draw(0)[0], draw(3)[0])


def test_training_keeps_the_best_validated_weights_and_is_made_once(tmp_path, monkeypatch):
    contest, run = toy(), Run("toy", tmp_path, "ci", (0,), progress=False)

    def build():
        return build_model("mlp-28", (6,), 2, seed=0, units=(8,))
    model, facts = a._trained(run, "x", build, contest, "mlp-28", seed=0, rate=1e-2, steps=40)
    p = a._probabilities(model, contest, "mlp-28", "val")
    assert a._auc(contest.y[contest.rows("val")], p) == pytest.approx(facts["val_auc"], abs=1e-4) and facts["val_auc"] > 0.9
    assert facts["steps"] == 40 and facts["kept_at"] in (0.2, 0.4, 0.6, 0.8, 1.0)
    monkeypatch.setattr(a, "_train_within", lambda *_, **__: pytest.fail("trained again"))
    again, same = a._trained(run, "x", build, contest, "mlp-28", seed=0)
    assert same == facts and np.array_equal(a._probabilities(again, contest, "mlp-28", "test"), a._probabilities(model, contest, "mlp-28", "test"))


def test_timing_leaves_no_trace():
    from medimg.training.record import TrainConfig
    from medimg.training.trainer import TrainState, make_loss
    contest, model = toy(), build_model("mlp-28", (6,), 2, seed=0, units=(8,))
    state = TrainState(model, TrainConfig(seed=0), make_loss("binary"))
    before = {k: v.copy() for k, v in state.arrays().items()}
    assert a._affordable(state, a._draws(contest, "mlp-28", 8, 0), 0.2, 1e-3) >= 2
    after = state.arrays()
    assert before.keys() == after.keys() and all(np.array_equal(before[k], after[k]) for k in before)


def test_class_folder_keeps_patients_apart(tmp_path):
    from medimg.data.imports import import_folder
    owner = a.class_folder(tmp_path, {"train": [1], "test": [2]})
    d = import_folder(tmp_path, patients=owner, name="phantom-slices")
    assert d.classes == ("clear", "nodule") and d.images.shape[1:] == (256, 256) and d.images.dtype == np.uint8
    assert set(d.patient_ids[d.splits == "train"]) == {"phantom-1"} and set(d.patient_ids[d.splits == "test"]) == {"phantom-2"}
    assert {0, 1} == set(d.labels[d.splits == "train"]) == set(d.labels[d.splits == "test"])


def test_variants_differ_in_what_follows_the_convolution_only():
    nets = {name: a.variant_network(block, (12, 12, 1), 2, widths=(3, 4)) for name, block in a.VARIANTS.items()}
    x = np.random.default_rng(0).random((2, 12, 12, 1), dtype="float32")
    assert len({net.count_params() for net in nets.values()}) == 1 and {net(x).shape[1] for net in nets.values()} == {1}
    weights = [[tuple(w.shape) for w in net.get_weights()] for net in nets.values()]
    assert all(w == weights[0] for w in weights)
    bounded = nets["gated"].get_layer("block_0").output
    assert bounded.shape[1:3] == nets["relu and max-pool"].get_layer("block_0_pool").output.shape[1:3] == (6, 6)
