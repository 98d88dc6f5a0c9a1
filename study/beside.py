"""What a report says of the files beside runs.jsonl: audit.json, tuning.json, paper.md and tried.md."""
import os

from configurator import ConfigError
from runs.files import read_json
from study import pictures
from study.leaderboard import fmt, table
from study.records import WRONG, warn

TRUTH = "~ flip_routed_later"  # one token flipped, the later layers re-routed, all later losses counted


def audit(folder):
    """audit.md as one text; empty without audit.json. A broken file is named and left out."""
    pieces = read_sections(folder, "audit", (audit_labels, audit_ceiling, audit_curves))
    if not pieces:
        return ""
    return "\n".join(["# Questions to finished runs", "", "Made by `python -m study.audit`.", "", *pieces])


def readme_sections(folder):
    """What was tuned and tried, as one text."""
    pieces = read_sections(folder, "tuning", (tuning,))
    pieces.append(by_hand(folder, "paper.md", "How it was made"))  # by study/paper.py
    pieces.append(by_hand(folder, "tried.md", "Tried"))
    return "\n".join(piece for piece in pieces if piece)


def read_sections(folder, name, sections):
    """The sections that are made from <name>.json; a broken one is named and left out."""
    content, pieces = read_beside(folder, name), []
    for section in sections:
        try:
            pieces.append(section(content, folder))
        except WRONG as error:
            warn(f"{os.path.join(folder, name)}.json: its {section.__name__} are not what python -m study "
                 f"writes ({type(error).__name__}: {error})")
    return [piece for piece in pieces if piece]


def read_beside(folder, name):
    """audit.json or tuning.json; a broken one is named and left out."""
    try:
        return read_json(os.path.join(folder, f"{name}.json")) or {}
    except ConfigError as error:
        warn(error)
        return {}


def audit_labels(audit, folder):
    if not audit.get("labels"):
        return ""
    lines = ["## Label audit", "",
             "Spearman's rho, one column a layer and then their mean, of each label and of the scores with "
             "exact flips: one token flipped, the later layers re-routed, its own and all later losses "
             "counted, which is what gated execution rewards.", ""]
    for run, layers in audit["labels"].items():
        rows = []
        for name in filter(is_shown, next(iter(layers.values()))):
            values = [layers[layer][name] for layer in layers]
            rows.append([name, *(f"{value:+.2f}" for value in values), f"{sum(values) / len(values):+.2f}"])
        lines += [f"### {run}", "", table(["", *(f"layer {layer}" for layer in layers), "mean"], rows)]
    return "\n".join(lines)


def is_shown(name):
    """The pairs "a ~ b" with what gated execution rewards, and every factor alone."""
    return "~" not in name or TRUTH in name


def audit_ceiling(audit, folder):
    if not audit.get("ceiling"):
        return ""
    names = list(next(iter(audit["ceiling"].values())))
    rows = [[run, *(fmt(values[name]) for name in names)] for run, values in audit["ceiling"].items()]
    return "\n".join([
        "## The ceiling", "",
        "Validation loss when each layer in turn routes by its on-policy label instead of its gate: what a "
        "perfect gate would reach with these cheap FFNs. The `dense` label is a function of the "
        "context, so a gate could know it; the `next` label has seen the answer. rho: the gate's scores "
        "with either label.", "",
        table(["run", *names], rows)])


def audit_curves(audit, folder):
    curves = audit.get("curves")
    if not curves:
        return ""
    budgets = [budget for budget, *_ in next(iter(curves.values()))]
    rows = [[run, *(f"{loss:.4f} ({realised:.3f})" for _, loss, realised in curve)]
            for run, curve in curves.items()]
    name, caption = pictures.write_budget_curves(curves, folder)
    return "\n".join(["## One checkpoint at other budgets", "",
                      "Validation loss under `threshold`, calibrated at each budget; the realised budget in "
                      "brackets.", "", table(["run", *budgets], rows), f"![{caption}]({name})\n"])


def tuning(trials, folder):
    if not trials:
        return ""
    rows = []
    for what, pairs in trials.items():
        best_rate, _ = min(pairs, key=val_loss)
        rows.append([what, ", ".join(f"{rate:g}: {loss:.4f}" for rate, loss in pairs), f"{best_rate:g}"])
    return "\n".join(["## Learning rates", "",
                      "Swept on validation text with a seed outside the study, as many trials for each.", "",
                      table(["what", "rate: val LM", "best"], rows)])


def val_loss(pair):
    return pair[1]


def by_hand(folder, name, title):
    """What is written in words. tried.md: by hand, what did not help included."""
    path = os.path.join(folder, name)
    if not os.path.exists(path):
        return ""
    with open(path, encoding="utf-8") as f:
        return f"## {title}\n\n{f.read().strip()}\n"
