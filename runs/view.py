"""The routing of a text as a picture: a page for a browser, or a PNG. Tokens stand in reading order; below a
token is one cell for each controlled layer."""
import html
import warnings

from configurator import ConfigError
from runs.files import write_whole

FULL, CHEAP, BEHIND, LETTER = "#c2410c", "#e4e7ec", "#f08a52", "#222222"
WIDTH = 72  # characters on a line
CAPTION = ("Each row of cells below the text is a layer that routes: dark where the token above went through "
           "the full FFN, pale where it took the cheap one. The colour behind a token deepens with how "
           "many went full.")


def write_view(path, title, pieces, masks, controlled, prompt_length):
    """pieces: the tokens' texts. masks: for each token [did each controlled layer run full]."""
    write = write_page if path.endswith(".html") else write_picture
    write_whole(path, lambda temporary: write(temporary, title, pieces, masks, controlled, prompt_length))
    print(f"wrote {path}")


def lines_of(pieces, width=WIDTH):
    """The tokens of each line, as ranges: where a line is full it ends between two words, if it has two."""
    lines, start, gap, used = [], 0, 0, 0
    for i, text in enumerate(pieces):
        blank = text.isspace()  # it may hang over the end, so that no line begins with it
        if text.startswith(" ") and not blank:
            gap = i
        while used + len(text) > width and i > start and not blank:
            end = gap if gap > start else i
            lines.append(range(start, end))
            start, used = end, sum(len(piece) for piece in pieces[end:i])
        used += len(text)
        if text[-1:].isspace():
            gap = i + 1
    lines.append(range(start, len(pieces)))
    return lines


def visible(text):
    """What shows for a token: marks for newlines and tabs, and for what no font has."""
    text = text.replace("\n", "\u21b5").replace("\t", "\u21e5")
    return "".join(c if c.isprintable() else "\u00b7" for c in text)


def summary(masks, prompt_length):
    """How much went full, in words."""
    shares = [sum(column) / len(masks) for column in zip(*masks)]
    words = (f"{sum(shares) / len(shares):.0%} of the decisions about these {len(masks):,} tokens were for "
             f"the full FFN; by layer, {min(shares):.0%} to {max(shares):.0%}.")
    if prompt_length < len(masks):
        words += " The prompt is underlined."
    return words


# -----------------------------------------------------------------------------
# as a page

STYLE = f"""
body {{ font: 15px/1.45 system-ui, sans-serif; margin: 2em auto; max-width: 62em; padding: 0 1em;
       background: #fff; color: {LETTER} }}
h1 {{ font-size: 1.3em }}
table {{ border-spacing: 1px 1px; margin: 0 0 .9em }}
th {{ font: 10px system-ui, sans-serif; color: #667; text-align: right; padding: 0 .6em 0 0; width: 4em }}
td {{ padding: 0; height: 7px; background: {CHEAP} }}
td.full {{ background: {FULL} }}
td.text {{ font: 15px ui-monospace, monospace; white-space: pre; min-width: .6em; text-align: center }}
td.prompt {{ text-decoration: underline }}
"""


def write_page(path, title, pieces, masks, controlled, prompt_length):
    lines = [page_line(line, pieces, masks, controlled, prompt_length) for line in lines_of(pieces)]
    text = [f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>',
            f"<style>{STYLE}</style><h1>{html.escape(title)}</h1><p>{CAPTION}</p>",
            f"<p>{summary(masks, prompt_length)}</p>", *lines]
    with open(path, "w", encoding="utf-8") as f:
        f.write("\n".join(text))


def page_line(line, pieces, masks, controlled, prompt_length):
    """A line of the text as a table: its tokens, and below them a row for each layer."""
    letters = [page_token(pieces[i], masks[i], controlled, i < prompt_length) for i in line]
    rows = [f"<tr><th>{''.join(letters)}"]
    for n, layer in enumerate(controlled):
        cells = ['<td class="full">' if masks[i][n] else "<td>" for i in line]
        rows.append(f"<tr><th>layer {layer}{''.join(cells)}")
    return "<table>" + "\n".join(rows) + "</table>"


def tint(depth):
    """BEHIND, mixed with white: a token that went full nowhere has none of it."""
    channels = [int(BEHIND[i:i + 2], 16) for i in (1, 3, 5)]
    return "#" + "".join(f"{round(255 - depth * (255 - channel)):02x}" for channel in channels)


def page_token(text, mask, controlled, in_prompt):
    full = ", ".join(str(layer) for layer, went_full in zip(controlled, mask) if went_full) or "none"
    hint = html.escape(f"{text!r}: full at {full}", quote=True)
    kind = "text prompt" if in_prompt else "text"
    return (f'<td class="{kind}" title="{hint}" style="background: {tint(sum(mask) / len(mask))}">'
            f"{html.escape(visible(text))}</td>")


# -----------------------------------------------------------------------------
# as a PNG

LETTERS, CELL, GAP = 1.9, 0.9, 1.2  # heights: of the text, of a layer, between two lines
MARGIN, HEADER = 7, 7.5  # room for the labels at the left, and for title and caption above
UNIT = 0.105  # inches to a character


def require_matplotlib(path):
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ConfigError(f"--view={path!r} needs matplotlib; install it, or name a .html") from None


def write_picture(path, title, pieces, masks, controlled, prompt_length):
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    lines = lines_of(pieces)
    widest = max(sum(len(pieces[i]) for i in line) for line in lines)
    width = max(widest, WIDTH) + MARGIN + 1
    step = LETTERS + CELL * len(controlled) + GAP
    height = HEADER + step * len(lines)
    figure = plt.figure(figsize=(width * UNIT, height * UNIT))
    axis = figure.add_axes([0, 0, 1, 1], xlim=(-MARGIN, width - MARGIN), ylim=(height, 0))
    axis.axis("off")
    draw_header(axis, title, summary(masks, prompt_length))
    for n, line in enumerate(lines):
        draw_line(axis, HEADER + n * step, line, pieces, masks, controlled, prompt_length)
    with warnings.catch_warnings(action="ignore"):  # of letters that the font lacks
        dpi = min(150, 60_000 / (height * UNIT))  # matplotlib draws 65,535 rows at most
        figure.savefig(path, dpi=dpi, format="png")
    plt.close(figure)


def draw_header(axis, title, words):
    axis.text(0, 1.2, title, fontsize=11, weight="bold", va="center", color=LETTER, parse_math=False)
    axis.text(0, 3.4, words, fontsize=7, va="center", color=LETTER)
    legend = [(FULL, "full FFN"), (CHEAP, "cheap FFN"),
              (BEHIND, "behind a token: the deeper, the more of its layers went full")]
    left = 0
    for color, meaning in legend:
        rectangle(axis, left, 4.9, 1.6, 1, color)
        axis.text(left + 2.2, 5.4, meaning, fontsize=7, va="center", color=LETTER)
        left += 12


def draw_line(axis, top, line, pieces, masks, controlled, prompt_length):
    """A line of the text: its tokens, and below them a row for each layer."""
    first = top + LETTERS
    for n, layer in enumerate(controlled):
        axis.text(-0.8, first + (n + 0.45) * CELL, f"layer {layer}", fontsize=5.5, ha="right", va="center",
                  color="#666677")
    left = 0
    for i in line:
        size = len(pieces[i])
        rectangle(axis, left, top, size, LETTERS - 0.1, tint(sum(masks[i]) / len(masks[i])))
        for k, letter in enumerate(visible(pieces[i])):
            axis.text(left + k + 0.5, top + LETTERS / 2, letter, fontsize=9, family="monospace",
                      ha="center", va="center", color=LETTER, parse_math=False)
        if i < prompt_length:
            axis.plot([left, left + size], [top + LETTERS - 0.15] * 2, color=LETTER, linewidth=0.8)
        for n, went_full in enumerate(masks[i]):
            color = FULL if went_full else CHEAP
            rectangle(axis, left + 0.06, first + n * CELL, size - 0.12, CELL - 0.12, color)
        left += size


def rectangle(axis, left, top, width, height, color):
    from matplotlib.patches import Rectangle
    axis.add_patch(Rectangle((left, top), width, height, facecolor=color, linewidth=0))
