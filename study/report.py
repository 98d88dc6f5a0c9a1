"""A results folder's pages, made from runs.jsonl and from what lies beside it.

README.md      the leaderboard and the main pictures, what was tuned and tried
verdicts.md    the rule, every claim, every contrast (details.py)
every_seed.md  every number of every run, the health of every gate (details.py)
audit.md       labels against exact flips, ceilings, other budgets (beside.py)
"""
import os

from configurator import ConfigError
from runs.files import write_text
from study import beside, details, pictures
from study.leaderboard import OWN_LINE, difference_rule, leaderboard
from study.measures import by_group, group_title
from study.records import read_records
from study.verdicts import Group, judge_group, judge_lengths

MAIN_PICTURES = ("gap_closed", "curves", "cost_quality")


def write_report(folder):
    """Make the pages and pictures of a folder from its runs.jsonl. Raises ConfigError without any run."""
    groups = read_groups(folder)
    if not groups:
        path = os.path.join(folder, "runs.jsonl")
        raise ConfigError(f"{path} holds no finished run; run python -m study first")
    titles = [group_title(group.key) for group in groups]
    judged = [judge_group(group) for group in groups]
    compared = judge_lengths(groups)
    images = [pictures.write_group(group, folder, slug) for group, slug in zip(groups, group_slugs(groups))]
    length_images = []
    if compared:
        length_images = pictures.write_lengths(groups, folder)

    pages = {"audit.md": beside.audit(folder)}
    pages["verdicts.md"] = details.verdicts_page(groups, titles, judged, compared)
    pages["every_seed.md"] = details.every_seed_page(groups, titles, [minor(names) for names in images])
    readme = [heading(groups, pages), *map(group_section, groups, titles, images),
              length_section(length_images), beside.readme_sections(folder)]
    pages["README.md"] = "\n".join(piece for piece in readme if piece)
    for name, text in pages.items():
        if text:
            write_text(os.path.join(folder, name), text)
    print(f"wrote {os.path.join(folder, 'README.md')}, the pages beside it and their pictures")


def read_groups(folder):
    groups = [Group(records) for records in by_group(read_records(folder)).values()]
    return sorted(groups, key=group_order)


def group_order(group):
    key = group.key
    return key["scale"], key["backbone_seed"], key["backbone"], group.max_iters, str(sorted(key.items()))


def group_slugs(groups):
    """A name for each group, used in the names of its pictures."""
    slugs = []
    for group in groups:
        slug = f"{group.max_iters}_steps"
        if group.key["backbone"] != groups[0].key["backbone"]:
            slug += f"_{os.path.basename(group.key['backbone'])}"
        if group.key["backbone_seed"]:
            slug += f"_backbone{group.key['backbone_seed']}"
        while slug in slugs:
            slug += "_other"
        slugs.append(slug)
    return slugs


# -----------------------------------------------------------------------------
# README.md

def heading(groups, pages):
    records = [record for group in groups for record in group.records]
    scale, hours = groups[0].key["scale"], sum(record["seconds"] for record in records) / 3600
    machines = sorted({record["machine"] for record in records})
    command = "python -m study --report_only"
    if scale != "tiny":
        command = f"python -m study config/{scale}.py --report_only"
    links = ["- [verdicts.md](verdicts.md): the rule, claim by claim, every contrast",
             "- [every_seed.md](every_seed.md): every number of every run, the health of every gate"]
    if pages["audit.md"]:
        links.append("- [audit.md](audit.md): do the labels say what flipping a token does; other budgets")
    lines = [f"# Results at scale `{scale}`", "",
             f"{len(records)} runs, {hours:.1f} hours of training, on {'; '.join(machines)}.", "", *links, "",
             "Every number of a run comes from `runs.jsonl`, one line a run. All tables and pictures are "
             "made again, without training anything, by:", "", f"    {command}", "", OWN_LINE]
    return "\n".join(lines)


def group_section(group, title, images):
    """The leaderboard and the main pictures of runs that may be compared."""
    key = group.key
    rows = key["batch_size"] * key["gradient_accumulation_steps"]
    links = [f"![{caption}]({image})\n" for image, caption in major(images)]
    lines = [f"## {title}", "",
             f"{len(group.records)} runs. A step is {rows} rows of {key['block_size']} tokens, "
             f"{group.max_iters * rows * key['block_size']:,} tokens a run. Backbone `{key['backbone']}` "
             f"seed {key['backbone_seed']} (identity {key['identity']}), training text {key['data']}, cheap "
             f"rank {key['cheap_rank']}, controlled layers {key['controlled']}.", "",
             leaderboard(group), difference_rule(group), *links]
    return "\n".join(lines)


def major(images):
    return [images[name] for name in MAIN_PICTURES if name in images]


def minor(images):
    return [image for name, image in images.items() if name not in MAIN_PICTURES]


def length_section(images):
    if not images:
        return ""
    return "\n".join(["## Longer training", "", *(f"![{caption}]({image})\n" for image, caption in images)])
