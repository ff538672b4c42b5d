"""Several workers train as one: the same curve, the same files, a clean stop when one dies, and nobody else can connect."""
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

from medimg.data.pipeline import Tensors, batches
from medimg.data.preprocess import Preprocessor
from medimg.errors import ConfigError, DatasetError, MedimgError
from medimg.training import distributed
from medimg.training.distributed import Team, fit_workers, launch, rehearse, step_seconds
from medimg.training.record import RunRecord, TrainConfig, load_checkpoint
from medimg.training.trainer import fit
from test_trainer import assert_same_arrays, epochs_on_disk, toy_dataset

CONFIG = TrainConfig(epochs=25, batch_size=16, learning_rate=3e-3, label_smoothing=0.1, class_weights=True, ema=0.9, weight_decay=0.01, seed=3)
PLANS = [{"norm": "none", "dropout": 0.3}, {"norm": "batch", "dropout": 0.3}, {"norm": "batch", "dropout": 0.3, "synchronise": False}]
SMALL = {"steps": 100, "batch": 32, "side": 16, "plans": [{"width": 8, "blocks": (1, 1), **plan} for plan in PLANS]}
KILLS = 10 if os.environ.get("MEDIMG_SOAK") else 1


def network():
    from medimg.models.networks import build_model
    return build_model("resnet", (16, 16, 1), 2, seed=0, width=8, blocks=(1, 1), dropout=0.3)


def toy(function, out, **options):
    return function(network(), toy_dataset(), options.pop("config", CONFIG), preprocessor=Preprocessor([("scale", {"low": 0, "high": 255})]),
                    out=out, **{"progress": False} | options)


# --- what runs inside the workers -------------------------------------------------------------------------------------------------

def rehearse_and_look(team, **options):
    """The rehearsal, and the device that each of this worker's listeners is bound to."""
    listeners = [sock for sock in distributed._sockets() if sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)]
    return rehearse(team, **options), [sock.getsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, 16).decode() for sock in listeners]


def refuse(team):
    if team.rank == 1:
        raise DatasetError("worker 1 has no images", remedy="give it some")
    team.total(np.zeros(1))


def wait_for_ever(team, note, files):
    Path(note).with_suffix(f".{team.rank}").write_text(str(os.getpid()))
    time.sleep(600)


# --- arithmetic, without a second process -----------------------------------------------------------------------------------------

def test_the_shares_together_are_the_joint_batch():
    rng = np.random.default_rng(0)
    images = Tensors(rng.random((50, 9, 9, 1), dtype=np.float32), np.arange(50, dtype=np.int32), np.array([f"{i:x}" for i in range(50)]))
    options = {"batch_size": 12, "seed": 4, "epoch": 2, "augment": True}
    shares = zip(*(Team(rank=rank, size=3).shared(12)(images, **options) for rank in range(3)))
    count = 0
    for (x, y), parts in zip(batches(images, **options), shares):
        assert np.array_equal(x, np.concatenate([part[0] for part in parts])) and np.array_equal(y, np.concatenate([part[1] for part in parts]))
        count += 1
    assert count == 4


def test_accumulation_is_the_joint_batch_without_batch_statistics():
    plans = SMALL["plans"][:1]
    joint, = rehearse(None, **{**SMALL, "plans": plans})
    parts, = rehearse(Team(accumulate=4), **{**SMALL, "plans": plans})
    assert np.abs(np.subtract(joint["losses"], parts["losses"])).max() < 1e-4 and joint["losses"][-1] < joint["losses"][0]


def test_step_seconds_by_hand():
    assert step_seconds(1, compute_s=0.3, parameters=10**6, bandwidth=1e8, latency_s=1.0) == pytest.approx(0.3)
    two = step_seconds(np.array([2, 4]), compute_s=0.4, parameters=25 * 10**5, bandwidth=1e8, latency_s=0.001, messages=3)
    assert two == pytest.approx([0.2 + 2 * (0.003 + 0.05), 0.1 + 6 * (0.003 + 0.025)])


@pytest.mark.parametrize("call, says", [
    (lambda: Team(rank=2, size=2), "number the workers 0 to 1"), (lambda: Team(accumulate=0), "accumulate is 0"), (lambda: Team(size=True), "size is True"),
    (lambda: Team(size=3).part(64), "64 images a step .* 3 workers .* multiple of 3"), (lambda: Team(accumulate=5).part(64), "multiple of 5"),
    (lambda: fit_workers(None, None, CONFIG, preprocessor=None, out="x", workers=3), "16 images a step"),
    (lambda: fit_workers(None, None, CONFIG, preprocessor=None, out="x", workers=2, engine="rey"), "did you mean ray"),
    (lambda: fit_workers(None, None, CONFIG, preprocessor=None, out="x", workers=2, address="10.0.0.1:6379"), "needs Ray.*--engine ray"),
    (lambda: launch("a:b", {}, workers=2, ports=[45011, 45011]), "1 ports for 2 workers"), (lambda: launch("a:b", {}, workers=-1), "size is -1")])
def test_contradictions_are_refused_before_a_process_starts(call, says):
    with pytest.raises(ConfigError, match=says):
        call()


def test_port_in_use_is_named():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(ConfigError, match=f"port {taken.getsockname()[1]} cannot be used"):
            launch("a:b", {}, workers=1, ports=[taken.getsockname()[1]])


def test_a_batch_that_the_fold_makes_uneven_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="80 images a step cannot be shared"):
        toy(fit, tmp_path, config=replace(CONFIG, batch_size=96), team=Team(size=3))


def test_without_ray_the_message_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r'pip install "medimg\[ray\]"'):
        toy(fit_workers, tmp_path, workers=2, engine="ray")


# --- two processes ----------------------------------------------------------------------------------------------------------------

def test_two_processes_give_the_curve_of_one_and_listen_on_loopback_only():
    two, devices = launch("test_distributed:rehearse_and_look", SMALL)
    one = rehearse(None, **{**SMALL, "plans": [{k: v for k, v in plan.items() if k != "synchronise"} for plan in SMALL["plans"]]})
    apart = [np.abs(np.subtract(a["losses"], b["losses"])).max() for a, b in zip(one, two)]
    assert all(len(a["losses"]) == 100 for a in two) and apart[0] < 1e-4 and apart[1] < 1e-4
    assert apart[2] > 1e-2                       # statistics of a worker's own images: another training
    for plan in (two[0], two[2]):                # one ring of two: each sends every number of the gradient, and the loss, once
        assert 1.0 <= plan["bytes"] / (4 * (plan["parameters"] + 1)) < 1.5
    assert devices and set(devices) == {"lo\0"}


def test_a_typed_error_in_a_worker_is_raised_here():
    with pytest.raises(DatasetError, match="worker 1 has no images; give it some"):
        launch("test_distributed:refuse", {})


def children():
    """{rank: process id} of the workers that this process started."""
    found = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            parent, words = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1]), (entry / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if parent == os.getpid() and b"medimg.training.distributed" in words:
            found[int(words[-2])] = int(entry.name)
    return found


def kill_in(out, rank, epoch, delay_s):
    """Kill worker `rank` some time after the checkpoint of `epoch`; returns the thread."""
    def hunt():
        while epochs_on_disk(out) < epoch:
            time.sleep(0.02)
        time.sleep(delay_s)
        os.kill(children()[rank], signal.SIGKILL)

    thread = threading.Thread(target=hunt, daemon=True)
    thread.start()
    return thread


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    out = tmp_path_factory.mktemp("team") / "run"
    return out, toy(fit_workers, out, workers=2)


def curve(record):
    return np.array([[row["loss"], row["val_loss"]] for row in record.history])


def test_the_run_of_two_workers_is_that_of_one(uninterrupted, tmp_path):
    out, record = uninterrupted
    alone = toy(fit, tmp_path / "run")
    gap = np.abs(curve(record) - curve(alone)).max(axis=1)         # another kernel normalises when nobody else is asked: rounding, which grows
    assert gap[:8].max() < 1e-4 and gap.max() < 1e-3 and record.fingerprint == alone.fingerprint
    assert sorted(p.name for p in out.iterdir()) == sorted(p.name for p in (tmp_path / "run").iterdir())


def test_patients_are_known_to_the_workers(tmp_path):
    from dataclasses import replace
    data = toy_dataset()
    data = replace(data, patient_ids=np.array([f"P{i // 4}" for i in range(len(data))]))
    record = fit_workers(network(), data, replace(CONFIG, epochs=2, monitor="patient_auc"), preprocessor=Preprocessor([("scale", {"low": 0, "high": 255})]),
                         out=tmp_path / "run", workers=2, progress=False)
    assert "patient_auc" in record.metrics


@pytest.mark.parametrize("seed", range(KILLS))
def test_kill_9_stops_all_and_the_resumed_run_is_bitwise_equal(tmp_path, uninterrupted, seed):
    draw = random.Random(seed)
    rank, epoch, out = draw.randrange(2), draw.randrange(CONFIG.epochs - 8), tmp_path / "run"
    kill_in(out, rank, epoch, draw.uniform(0, 0.2))
    with pytest.raises(MedimgError, match=f"worker {rank} was killed by signal 9.*run the same command again"):
        toy(fit_workers, out, workers=2)
    assert children() == {} and load_checkpoint(out / "checkpoint.npz")[1]["status"] == "running"
    (tmp_path / "alone").mkdir()
    (tmp_path / "alone" / "checkpoint.npz").write_bytes((out / "checkpoint.npz").read_bytes())
    record = toy(fit_workers, out, workers=2)
    assert_same_arrays(uninterrupted[0], out)
    assert record.resumed == 1
    alone = toy(fit_workers, tmp_path / "alone", workers=1)         # another number of workers
    assert np.abs(curve(alone) - curve(uninterrupted[1])).max() < 1e-4


def test_no_worker_outlives_a_killed_launcher(tmp_path):
    code = "import sys; from medimg.training.distributed import launch; launch('test_distributed:wait_for_ever', {'note': sys.argv[1], 'files': sys.argv[2]})"
    scratch = tmp_path / "scratch"
    (images := scratch / "images").mkdir(parents=True)
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "TMPDIR": str(scratch)}
    launcher = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "pid"), str(images)], env=env, stderr=subprocess.DEVNULL)
    notes = [tmp_path / f"pid.{rank}" for rank in range(2)]
    while not all(note.exists() and note.read_text() for note in notes):
        assert launcher.poll() is None
        time.sleep(0.05)
    launcher.kill()
    launcher.wait()
    limit = time.monotonic() + 20
    while alive := [note for note in notes if Path(f"/proc/{note.read_text()}").exists()]:
        assert time.monotonic() < limit, alive
        time.sleep(0.05)
    assert not [path.name for path in scratch.iterdir() if path.name.startswith(("medimg-", "images"))], "a copy of the images was left behind"


def test_command_line(tmp_path):
    line = [sys.executable, "-m", "medimg.cli", "train", "phantom-cxr", "--profile", "ci", "--n", "150", "--data", "phantom", "--epochs", "1", "--out", str(tmp_path / "run")]
    refused = subprocess.run([*line, "--workers", "7"], capture_output=True, text=True)
    assert refused.returncode == 2 and "cannot be shared evenly by 7 workers" in refused.stderr and "Traceback" not in refused.stderr
    done = subprocess.run([*line, "--workers", "2", "--accumulate", "2", "--json"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["status"] == "finished" and (tmp_path / "run" / "data.json").is_file()


def test_two_workers_of_ray_on_this_machine(tmp_path):
    config = replace(CONFIG, epochs=3)
    record, alone = toy(fit_workers, tmp_path / "run", config=config, workers=2, engine="ray"), toy(fit, tmp_path / "alone", config=config)
    assert record.status == "finished" and record == RunRecord.load(tmp_path / "run")
    assert np.abs(curve(record) - curve(alone)).max() < 1e-4 and record.fingerprint == alone.fingerprint
