"""How pictures look, and where an arm stands in them. Colours are Okabe and Ito's, which the colour-blind
tell apart too; a G3 gate's lines are dashed beside the solid ones of the same recipe's G1."""
import os

import matplotlib
import matplotlib.pyplot as plt
from matplotlib.colors import to_rgb
from PIL import Image

from runs.files import write_whole
from study.leaderboard import setting

matplotlib.use("Agg")
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C564B", "#7A7A00")
BASELINES = {"static": ("black", ":"), "random": ("0.45", ":"), "cheap_only": ("0.6", "-"),
             "full_adapter": ("black", "-")}
WIDTH = 11  # inches


def palette():
    """Greys, and the colours with their tints: what an edge blends into."""
    values = [level for grey in range(0, 256, 15) for level in 3 * [grey]]
    for colour in COLOURS:
        for tint in (0, 0.3, 0.6, 0.85):
            values += [round(255 * (level + tint * (1 - level))) for level in to_rgb(colour)]
    image = Image.new("P", (1, 1))
    image.putpalette(values)
    return image


def save(figure, folder, name, caption):
    """Write folder/name.png in few colours, which is a third of the size -> (file name, caption)."""
    figure.canvas.draw()
    image = Image.frombuffer("RGBA", figure.canvas.get_width_height(), figure.canvas.buffer_rgba())
    image = image.convert("RGB").quantize(palette=palette(), dither=Image.Dither.NONE)
    plt.close(figure)

    def write(temporary):
        image.save(temporary, format="PNG", optimize=True)
    write_whole(os.path.join(folder, f"{name}.png"), write)
    return f"{name}.png", caption


# -----------------------------------------------------------------------------
# which arm stands where, and how it is drawn

def family(group, arm):
    """The panel that an arm stands in."""
    if arm in BASELINES:
        return "baselines"
    if setting(group, arm, "budget") != 0.5:
        return f"{setting(group, arm, 'budget'):.0%} of the tokens"
    if setting(group, arm, "lambda_distill"):
        return "distilled"
    return setting(group, arm, "estimator")


def families(group, arms):
    """{family: its arms} without baselines, in a fixed order."""
    order = ["ste_norm", "scaled", "ste", "distilled"]
    held = {}
    for arm in sorted(arms):
        held.setdefault(family(group, arm), []).append(arm)
    held.pop("baselines", None)
    names = [name for name in order if name in held] + sorted(held.keys() - set(order))
    return {name: held[name] for name in names}


def styles(arms):
    """{arm: (colour, line style)}: one colour a recipe, whichever its gate; beyond eight, other dashes."""
    recipes = sorted({recipe_of(arm) for arm in arms})
    drawn = {}
    for arm in arms:
        place = recipes.index(recipe_of(arm))
        dashes = [("-", "--"), ("-.", (0, (3, 1, 1, 1, 1, 1)))][place // len(COLOURS) % 2]
        drawn[arm] = COLOURS[place % len(COLOURS)], dashes[arm.startswith("g3_")]
    return drawn


FAMILY_COLOURS = {"ste_norm": "#0072B2", "scaled": "#D55E00", "ste": "#CC79A7", "distilled": "#009E73",
                  "baselines": "black"}


def family_colour(group, arm):
    return FAMILY_COLOURS.get(family(group, arm), "#E69F00")


def recipe_of(arm):
    return arm.removeprefix("g1_").removeprefix("g3_")
