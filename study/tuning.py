"""The sweep of learning rates, with a seed outside the study: every gate and estimator gets as many trials,
with and without labels."""
import os

from metrics import causal
from runs.files import read_json

SEED = 10
GATE_RATES = (1e-3, 3e-3, 1e-2)
RATES = {"cheap_only": (1e-2, 3e-2, 1e-1), "full_adapter": (1e-3, 3e-3, 1e-2)}  # of the cheap FFNs


def sweep():
    """[(arm, key, rates)]: the gates' rates with and without labels, the references' with either loss."""
    rows = []
    for gate in ("g1", "g3"):
        for arm in ("no_utilrank", "full_aux", "scaled", "scaled_full_aux", "ste", "ste_full_aux"):
            rows.append((f"{gate}_{arm}", "gate_lr", GATE_RATES))
    for reference, rates in RATES.items():
        rows.append((reference, "learning_rate", rates))
        rows.append((f"{reference}_distill", "learning_rate", rates))
    return rows


def trial_folder(folder, arm, rate):
    return os.path.join(folder, f"{rate:g}", arm, f"seed{SEED}")


def trials(arms, folder):
    """{out_dir: words of train.py} of the sweep."""
    lines = {}
    for arm, key, rates in sweep():
        for rate in rates:
            out = trial_folder(folder, arm, rate)
            lines[out] = arms.words(arm, f"--{key}={rate}", f"--seed={SEED}", f"--out_dir={out}")
    return lines


def losses_of_trials(folder):
    """{"arm, key": [[rate, val loss]]} of the trials that are finished."""
    losses = {}
    for arm, key, rates in sweep():
        rows = []
        for rate in rates:
            path = os.path.join(trial_folder(folder, arm, rate), "summary.json")
            summary = read_json(path, {"val_loss": dict})
            if summary:
                rows.append([rate, causal(summary["val_loss"])])
        if rows:
            losses[f"{arm}, {key}"] = rows
    return losses
