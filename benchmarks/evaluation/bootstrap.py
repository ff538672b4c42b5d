"""What 2,000 bootstrap resamples of patients cost for twelve metrics, beside a loop over scikit-learn, and DeLong's interval of a million scores.

    make bench SUBJECT=bootstrap
    python benchmarks/evaluation/bootstrap.py --json results/benchmarks/evaluation_bootstrap.json

10,000 simulated cases, once as 10,000 patients and once as 3,334 patients of three images; one sixth of the scores tie. Ours is `bootstrap_metrics` with all that it does:
drawing, twelve metrics, influences, BCa intervals. The loop draws a resample of patients and calls scikit-learn's function (for one metric NumPy's mean, where scikit-learn has none) for each of
the twelve. It would take minutes, so LOOPS resamples of it are timed in each round and multiplied up to 2,000: resamples cost the same each. DeLong has no peer in the packages named here: its row is
seconds, beside the same formula over all pairs, timed on 10,000 scores and multiplied by the number of pairs. NumPy's own threads decide how many processors are used; nothing here asks for more than one.
"""
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import numpy as np  # noqa: E402
from sidebyside import main, seconds  # noqa: E402

N, N_BOOT, LOOPS, SCORES = 10_000, 2_000, 10, 1_000_000


def cases(n, seed=0):
    """Labels and probabilities of n cases, some of them tied."""
    rng = np.random.default_rng(seed)
    y = (rng.random(n) < 0.3).astype(int)
    p = 1 / (1 + np.exp(-rng.normal(1.5 * y - 1)))
    p[::6] = p[::6].round(2)
    return y, p


def sklearn_loop(y, p, groups):
    """LOOPS resamples of patients, twelve calls each."""
    from sklearn import metrics as m
    rng, ids = np.random.default_rng(1), np.unique(groups)
    members = np.split(np.argsort(groups, kind="stable"), np.cumsum(np.bincount(groups))[:-1])
    for _ in range(LOOPS):
        rows = np.concatenate([members[g] for g in rng.choice(ids, len(ids))]) if len(ids) < len(y) else rng.integers(0, len(y), len(y))
        t, s = y[rows], p[rows]
        a = (s >= 0.5).astype(int)
        for function in (m.accuracy_score, m.recall_score, m.precision_score, m.f1_score, m.balanced_accuracy_score, m.matthews_corrcoef, m.cohen_kappa_score):
            function(t, a)
        m.recall_score(t, a, pos_label=0), m.precision_score(t, a, pos_label=0)
        m.roc_auc_score(t, s), m.average_precision_score(t, s), np.mean((s - t) ** 2)


def all_pairs(y, s):
    """DeLong's variance over all pairs, a block of sick cases at a time."""
    sick, healthy = s[y == 1], s[y == 0]
    v10, v01 = np.empty(len(sick)), np.zeros(len(healthy))
    for start in range(0, len(sick), 500):
        block = sick[start:start + 500, None]
        wins = (block > healthy) + 0.5 * (block == healthy)
        v10[start:start + 500] = wins.mean(axis=1)
        v01 += wins.sum(axis=0)
    return v10.var(ddof=1) / len(sick) + (v01 / len(sick)).var(ddof=1) / len(healthy)


def row(what, peer, rounds, **more):
    """Medians and the ratio of each round, printed and as the other scripts write them."""
    ratios = [theirs / ours for ours, theirs in rounds]
    ours, theirs = (statistics.median(side) for side in zip(*rounds))
    print(f"{what:<52} medimg {ours:7.3f} s   {peer:<34} {theirs:9.1f} s   ratio {statistics.median(ratios):7.1f} ({min(ratios):.1f} to {max(ratios):.1f})", flush=True)
    return {"what": what, "peer": peer, "ours_s": ours, "peer_s": theirs, "ratio": statistics.median(ratios), "ratio_min": min(ratios), "ratio_max": max(ratios),
            "repeats": len(rounds), **more}


def measure(repeats):
    """All rows; see the text above."""
    from medimg.evaluation.intervals import METRICS, _auc_covariance, bootstrap_metrics, delong_interval
    y, p = cases(N)
    rows = []
    for what, groups in ((f"{len(METRICS)} metrics, {N} patients, {N_BOOT} resamples", np.arange(N)), (f"{len(METRICS)} metrics, {N} images of {N // 3 + 1} patients", np.arange(N) // 3)):
        bootstrap_metrics(y, p, groups=groups, n_boot=50)
        sklearn_loop(y[:100], p[:100], groups[:100])
        rounds = [(seconds(bootstrap_metrics, y=y, p=p, groups=groups, n_boot=N_BOOT), seconds(sklearn_loop, y=y, p=p, groups=groups) * N_BOOT / LOOPS) for _ in range(repeats)]
        rows.append(row(what, f"scikit-learn loop, {LOOPS} of {N_BOOT} timed", rounds, resamples_timed=LOOPS))
    (many_y, many_s), (few_y, few_s) = cases(SCORES), cases(N)
    assert np.isclose(all_pairs(few_y, few_s), _auc_covariance(few_y, [few_s])[1][0, 0], rtol=1e-9)
    share = (SCORES / N) ** 2
    rounds = [(seconds(delong_interval, y=many_y, s=many_s), seconds(all_pairs, y=few_y, s=few_s) * share) for _ in range(repeats)]
    rows.append(row(f"DeLong's interval, {SCORES} scores", f"all pairs, {N} scores timed", rounds, pairs_timed_share=1 / share))
    return rows


if __name__ == "__main__":
    main(measure, __doc__.splitlines()[0])
