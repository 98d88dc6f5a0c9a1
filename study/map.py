"""results/README.md: the map, claims x regimes, from every results/<scale>/runs.jsonl."""
import glob
import os
from typing import NamedTuple

import matplotlib.pyplot as plt
from matplotlib.lines import Line2D

from configurator import ConfigError
from runs.files import write_text
from study.claims import CLAIMS, LENGTH_CLAIM, READINGS, label_gain
from study.details import paragraphs
from study.leaderboard import table
from study.measures import group_title
from study.report import read_groups
from study.style import WIDTH, save
from study.verdicts import count_leaning, judge_group, judge_lengths, rows_of, seeds_of, verdict_of

COLOURS = {"agree": "#009E73", "disagree": "#D55E00", "mixed": "#E69F00", "undecided": "0.85",
           "not run": "white", "for": "#99D8C7", "against": "#EEBF99"}
GATE_COLOURS = {"g1": "#0072B2", "g3": "#D55E00"}
HEADING = """# The map: where the claims hold

Each column is a regime: runs that may be compared. Each row is a claim under one reading of the estimator,
C1 to C8 the paper's and H0 to H7 ours. A cell says *agree*, *disagree*, *mixed* or *undecided*, by a rule
that was written before the numbers, and in brackets how many seeds there are. A claim has several
*contrasts*, differences between two recipes that are judged one by one. An undecided cell *leans* if the
contrasts with unanimous seeds all point one way. H5 compares a column with the shorter runs beside it."""


class Cell(NamedTuple):
    verdict: str
    seeds: str = ""
    leaning: str = ""  # of an undecided cell: for or against, where all contrasts of one sign are on one side

    def words(self):
        if self.verdict == "not run":
            return "-"
        if self.leaning:
            return f"undecided, leans {self.leaning} ({self.seeds})"
        return f"{self.verdict} ({self.seeds})"


def write_map(results):
    """Make <results>/README.md and its pictures; notes.md beside it is written by hand and included."""
    paths = sorted(glob.glob(os.path.join(glob.escape(results), "*", "runs.jsonl")))
    by_folder = {os.path.dirname(path): read_groups(os.path.dirname(path)) for path in paths}
    groups = [group for groups in by_folder.values() for group in groups]
    if not groups:
        raise ConfigError(f"no folder in {results} holds a runs.jsonl with runs; run python -m study "
                          f"--report={os.path.join(results, 'tiny')} first")
    titles = [f"`{group.key['scale']}`, {group_title(group.key)}" for group in groups]
    names, cells, absent = map_cells(groups)
    pictures = [save(draw_map(names, titles, cells), results, "map", "The map: claims x regimes"),
                save(draw_gains(titles, groups), results, "label_gains",
                     "What labels take off the test loss, one dot a seed: right of 0 they help")]
    text = [paragraphs(HEADING), *(f"![{caption}]({image})" for image, caption in pictures),
            notes(results), "## The cells",
            table(["claim", "reading", *titles],
                  [[*name, *(cell.words() for cell in line)] for name, line in zip(brief(names), cells)])]
    if absent:
        text.append(f"Not run in any regime: {', '.join(absent)}.")
    text += ["## The claims in full",
             "\n".join(f"- **{claim.name}**: {claim.text}" for claim in (*CLAIMS, LENGTH_CLAIM)),
             "## Folders", "\n".join(folder_line(folder, results) for folder in by_folder)]
    write_text(os.path.join(results, "README.md"), "\n\n".join(piece for piece in text if piece) + "\n")
    print(f"wrote {os.path.join(results, 'README.md')}")


def map_cells(groups):
    """-> names [(claim, reading)], their lines of Cells, one for each group, and what no group has run."""
    judged, compared = [judge_group(group) for group in groups], judge_lengths(groups)
    names, cells, absent = [], [], []
    for claim in CLAIMS:
        for reading in claim.readings:
            name = f"{claim.name} {claim.title}", reading
            line = [cell_of(rows_of(claim, reading, of_group)) for of_group in judged]
            if all(cell.verdict == "not run" for cell in line):
                absent.append(f"{claim.name} {reading}")
            else:
                names.append(name)
                cells.append(line)
    if compared:
        names.append((f"{LENGTH_CLAIM.name} {LENGTH_CLAIM.title}", *LENGTH_CLAIM.readings))
        cells.append([cell_of([row for _, longer, row in compared if longer is group]) for group in groups])
    order = sorted(range(len(names)), key=lambda i: names[i][0].split()[0])
    return [names[i] for i in order], [cells[i] for i in order], absent


def brief(names):
    """The same with a claim's name in its first line only."""
    lines, last = [], None
    for claim, reading in names:
        lines.append(["", reading] if claim == last else [claim, reading])
        last = claim
    return lines


def cell_of(rows):
    if not rows:
        return Cell("not run")
    verdict, sides = verdict_of(rows), count_leaning(rows)
    leaning = ""
    if verdict == "undecided" and (sides["for"] > 0) != (sides["against"] > 0):
        leaning = max(sides, key=sides.get)
    return Cell(verdict, seeds_of(rows), leaning)


def folder_line(folder, results):
    name = os.path.relpath(folder, results)
    return f"- [{name}]({name}/README.md): the leaderboard, every verdict, every seed"


def notes(results):
    path = os.path.join(results, "notes.md")
    if not os.path.exists(path):
        return ""
    with open(path, encoding="utf-8") as f:
        return f.read().strip()


def draw_gains(titles, groups):
    """The gain of off-policy labels in every regime, a panel for each reading."""
    height = 1.3 + 0.4 * len(groups)
    figure, axes = plt.subplots(1, len(READINGS), sharey=True, figsize=(WIDTH, height), dpi=80,
                                layout="constrained")
    for axis, reading in zip(axes, READINGS):
        for y, group in enumerate(groups):
            for gate, marker, shift in (("g1", "o", -0.15), ("g3", "^", 0.15)):
                gains = [group.value(label_gain(gate, reading), seed, "test_loss") for seed in group.seeds]
                gains = [gain for gain in gains if gain is not None]
                axis.plot(gains, [y + shift] * len(gains), marker, ms=4, alpha=0.8, color=GATE_COLOURS[gate])
        axis.axvline(0, color="black", lw=0.8)
        axis.set_title(reading, fontsize=9)
        axis.set_xlabel("test LM without labels - with", fontsize=8)
        axis.set_yticks(range(len(groups)), [title.replace("`", "") for title in titles], fontsize=7)
        axis.set_ylim(len(groups) - 0.5, -0.5)
        axis.tick_params(labelsize=7)
        axis.grid(alpha=0.3)
    handles = [Line2D([], [], marker=marker, ls="", ms=4, color=GATE_COLOURS[gate], label=gate)
               for gate, marker in (("g1", "o"), ("g3", "^"))]
    figure.legend(handles=handles, fontsize=7, loc="outside lower center", ncols=2, frameon=False)
    return figure


def draw_map(names, titles, cells):
    """The table as coloured cells; the words stand in them, so that no colour has to be told apart."""
    left = 0.5 * len(titles)  # the room for the names, in columns
    width, height = max(7.0, min(WIDTH, 1.7 * (left + len(titles)))), 1.2 + 0.24 * len(names)
    figure, axis = plt.subplots(figsize=(width, height), dpi=80, layout="constrained")
    for y, line in enumerate(cells):
        for x, cell in enumerate(line):
            colour = COLOURS[cell.leaning or cell.verdict]
            axis.add_patch(plt.Rectangle((x, y), 1, 1, facecolor=colour, edgecolor="white"))
            if cell.verdict != "not run":
                words = cell.words().replace("undecided, leans", "leans")
                axis.annotate(words, (x + 0.5, y + 0.5), ha="center", va="center", fontsize=7)
    for y, (claim, reading) in enumerate(brief(names)):
        axis.text(-0.05, y + 0.5, reading, ha="right", va="center", fontsize=7)
        if claim:
            axis.text(-left, y + 0.5, claim, va="center", fontsize=7, fontweight="bold")
            axis.plot([-left, len(titles)], [y, y], color="0.6", lw=0.6)
    axis.set_xlim(-left, len(titles))
    axis.set_ylim(len(names), 0)
    axis.set_xticks([x + 0.5 for x in range(len(titles))],
                    [title.replace("`", "").replace(", ", "\n") for title in titles], fontsize=7)
    axis.xaxis.tick_top()
    axis.set_yticks([])
    axis.tick_params(length=0)
    for spine in axis.spines.values():
        spine.set_visible(False)
    return figure
