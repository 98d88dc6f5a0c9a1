"""Arms: their names, the words of train.py that make them, and which runs may lie in one study."""
import os

import train
from configurator import HERE, ConfigError, arm_words, configure, did_you_mean, load_plugin, read_arms
from gates import ESTIMATORS, GATES, LABELS, LOSSES, TARGETS
from prepare import load_data
from runs.files import read_json
from runs.folder import FREE_KEYS
from study.measures import group_difference
from study.records import run_folders

REFERENCES = ["cheap_only", "full_adapter"]
BASELINES = ["random", "static"]
PLAIN = ["g1_no_utilrank", "g3_no_utilrank", "g1_full_aux", "g3_full_aux"]


def for_both(*endings):
    return [f"{gate}_{ending}" for ending in endings for gate in ("g1", "g3")]


# Names for --arms=, and `all` besides. The references come by themselves.
SETS = {
    "default": [*BASELINES, *PLAIN, "best"],
    # estimator x labels, for both gates, and the frozen model as the teacher
    "map": [*BASELINES, *PLAIN, "best", "static_distill",
            *for_both("on_policy", "on_policy_dense", "lambda_01", "distill"),
            *for_both("scaled", "scaled_full_aux", "scaled_on_policy", "scaled_on_policy_dense"),
            *for_both("ste", "ste_anchor", "ste_full_aux", "ste_on_policy", "ste_on_policy_dense")],
    # the paper's claims under the default estimator
    "paper": [*BASELINES, *PLAIN, *for_both("on_policy"), "g3_no_jepa", "g3_jepa_025", "g3_jepa_2",
              "random_budget25", "static_budget25", *for_both("no_utilrank_budget25", "full_aux_budget25")],
    # is the gate alive, and who teaches it; at half and at a quarter of the tokens
    "teacher": [*BASELINES, "g1_ste", "g1_ste_anchor", "g1_no_utilrank", "g1_ste_full_aux",
                "g1_ste_anchor_full_aux", "g1_full_aux", "g1_distill", "old_best", "g1_scaled_distill_dense",
                "g1_distill_dense",
                "g3_distill_dense", "best_adamw", "best", "g3_best", "static_distill", "static_distill_muon",
                "random_distill_muon", "best_budget25", "g1_distill_dense_budget25", "old_best_budget25",
                "g1_full_aux_budget25", "static_budget25", "static_distill_muon_budget25"],
    # the paper's ablation where Muon trains the cheap FFNs
    "muon": ["static_muon", *for_both("no_utilrank_muon", "full_aux_muon")],
}
BACKBONE, TINY_STEPS = "backbone_long", 300  # of a study, where neither a scale file nor a word says another
SET_BY_STUDY = {"seed": "--seeds=0,1,2", "out_dir": "--study=NAME", "recipe": "--arms=NAME",
                "mode": "--arms=NAME", "eval_only": "train.py"}  # keys it sets, and what to use instead
# What makes runs comparable, as far as a config says it before anything is made.
GROUP_KEYS = ("scale", "dataset", "max_iters", "batch_size", "gradient_accumulation_steps", "block_size",
              "cheap_rank", "controlled", "n_layer", "n_head", "n_embd", "activation", "backbone",
              "backbone_seed", "backbone_iters", "backbone_lr", "backbone_muon_lr", "backbone_batch_size")


def is_key(word):
    return word.startswith("--")


def key_of(word):
    return word[2:].partition("=")[0]


# -----------------------------------------------------------------------------
# arms

def plain_defaults():
    """train.py's keys, without those of plugins."""
    losses = {name: loss for name, loss in LOSSES.items() if not loss.__module__.startswith("plugin_")}
    return train.DEFAULTS | {f"lambda_{name}": loss.weight for name, loss in losses.items()}


def recipe_arms():
    """The recipes of config/ that train controllers, by reading their files."""
    arms = []
    for name in sorted(os.listdir(os.path.join(HERE, "config"))):
        recipe, extension = os.path.splitext(name)
        if extension == ".py":
            config = configure(plain_defaults(), [os.path.join(HERE, "config", name)])
            if config["recipe"] == recipe and config["mode"] != "full":
                arms.append(recipe)
    return arms


class Arms:
    """Every arm there is, and the words of train.py that make it: a recipe of config/, a line of
    config/arms.ini, or a plugin's gate, which is trained like g1_no_utilrank."""

    def __init__(self, words, plugins=()):
        """words: scale files and keys for every arm; plugins: files. What only a plugin knows goes to arms
        that take the plugin, so that the others stay what they are without it."""
        self.plugins, self.defaults, self.table = plugins, plain_defaults(), read_arms()
        for path in plugins:
            load_plugin(path)
        modules = {f"plugin_{os.path.splitext(os.path.basename(path))[0]}" for path in plugins}
        registries = {"gate": GATES, "estimator": ESTIMATORS, "oracle": LABELS, "label_target": TARGETS,
                      "loss": LOSSES}
        self.added = {key: [name for name, entry in registry.items() if entry.__module__ in modules]
                      for key, registry in registries.items()}
        self.scales = [w for w in words if not is_key(w)]
        keys = [w for w in words if is_key(w)]
        self.keys = [w for w in keys if not self.needs_plugin(w)]
        self.plugin_keys = [w for w in keys if self.needs_plugin(w)]
        recipes = recipe_arms()
        for gate in self.added["gate"]:
            if gate in self.table or gate in recipes:
                raise ConfigError(f"the plugin's gate {gate!r} has the name of an arm; give it another")
        self.names = [*recipes, *self.table, *self.added["gate"]]

    def needs_plugin(self, word):
        key, _, value = word[2:].partition("=")
        return key in [f"lambda_{loss}" for loss in self.added["loss"]] or value in self.added.get(key, [])

    def takes_plugin(self, arm):
        """The gates of a plugin take it, and arms whose line names something of it. Where the plugin has no
        gate and a word for all arms names something of it, every arm with a learned gate does."""
        if arm in self.added["gate"] or any(map(self.needs_plugin, self.table.get(arm, []))):
            return True
        if self.added["gate"] or not self.plugin_keys:
            return False
        config = configure(self.defaults, arm_words(arm))
        return config["mode"] == "topk" and GATES[config["gate"]].learned

    def words(self, arm, *last):
        """The command line of train.py for an arm; `last` are keys that win over all others."""
        if arm in self.added["gate"]:
            recipe, *changes = [*arm_words("g1_no_utilrank"), f"--gate={arm}", f"--recipe={arm}"]
        else:
            recipe, *changes = arm_words(arm)
        files, given = [], self.keys
        if self.takes_plugin(arm):
            files = [f"--plugin={path}" for path in self.plugins]
            given = [*given, *self.plugin_keys]
        by_key = {key_of(word): word for word in [*self.length(), *changes, *given, *last]}
        return [*self.scales, recipe, *files, *by_key.values()]

    def length(self):
        """The keys of a study's runs that were not given: on a backbone that was trained until it flattens,
        and evaluated ten times."""
        config, given = configure(self.defaults, [*self.scales, *self.keys]), set(map(key_of, self.keys))
        steps, words = config["max_iters"], []
        if "backbone" not in given and config["backbone"] == self.defaults["backbone"]:
            words.append(f"--backbone={BACKBONE}")
        if "max_iters" not in given and not self.scales:
            steps = TINY_STEPS
            words.append(f"--max_iters={steps}")
        if "eval_interval" not in given and ("max_iters" in given or not self.scales):
            words.append(f"--eval_interval={max(1, steps // 10)}")
        return words

    def resolve(self, text):
        """--arms=... -> names of arms, each once, after the references that they need."""
        arms, named = [], []
        for name in text.split(","):
            if name in SETS:
                arms += SETS[name]
            elif name == "all":
                arms += self.names
            elif name in self.names:
                named.append(name)
                arms.append(name)
            else:
                raise ConfigError(f"--arms names {name!r}, which is no recipe of config/, no line of "
                                  "config/arms.ini and no gate of a plugin; "
                                  + did_you_mean(name, [*self.names, *SETS, "all"]))
        if len(set(named)) != len(named):
            raise ConfigError(f"--arms={text} names an arm twice; name each once")
        references = [reference for arm in arms for reference in self.references(arm)]
        return list(dict.fromkeys([*references, *arms]))

    def references(self, arm):
        """The names of the references that are trained like the arm."""
        config, _ = train.configure_run(self.words(arm))
        ending = ""
        if config["lambda_distill"]:
            ending += "_distill"
        if config["muon_lr"]:
            ending += "_muon"
        return [*REFERENCES, *(f"{name}{ending}" for name in REFERENCES)]


def refuse_words(words):
    """Keys that a study sets itself, and recipes in the place of scales. Raises ConfigError."""
    for word in words:
        if is_key(word) and key_of(word) in SET_BY_STUDY:
            raise ConfigError(f"{word!r}: a study sets {key_of(word)}; use {SET_BY_STUDY[key_of(word)]}")
    files = [w for w in words if not is_key(w)]
    if configure(plain_defaults(), files)["recipe"] != train.DEFAULTS["recipe"]:
        raise ConfigError(f"{' '.join(files)}: a study takes scale files; name a recipe with --arms=NAME")


# -----------------------------------------------------------------------------
# which runs may lie in one study

def refuse_mixed(jobs):
    """Raises ConfigError unless the runs of jobs, {out_dir: words of train.py}, and those that lie beside
    them may all be compared, and what is there already is what is asked for."""
    configs = {out: train.configure_run(words)[0] for out, words in jobs.items()}
    first = next(iter(configs))
    data = train_hash(configs[first])
    group = group_by_config(configs[first], data)
    for out, config in configs.items():
        refuse_another_group(group, out, group_by_config(config, data))
    for folder in dict.fromkeys(os.path.dirname(os.path.dirname(out)) for out in configs):
        for _, _, path in run_folders(folder):
            asked, held = configs.get(path), config_of_run(path)
            if held is None or (asked and asked["overwrite"]):
                continue
            held_data = held.get("data", {}).get("train") if data else None
            refuse_another_group(group, path, group_by_config(held, held_data))
            if asked:
                refuse_stale(path, held, asked)


def config_of_run(folder):
    """The config.json of a run that has something to lose; None where there is none, or it is broken."""
    if not any(os.path.exists(os.path.join(folder, name)) for name in ("ckpt.pt", "summary.json")):
        return None
    try:
        return read_json(os.path.join(folder, "config.json"), {"recipe": str, "max_iters": int, "data": dict})
    except ConfigError:
        return None  # the report names it


def group_by_config(config, data):
    return {key: config.get(key) for key in GROUP_KEYS} | {"data": data}


def refuse_another_group(group, path, other):
    difference = group_difference(group, other)
    if difference:
        key, asked, held = difference
        raise ConfigError(f"{path} has {key} {held!r}, and what is asked for has {asked!r}: they may not be "
                          "compared, as runs of one study are; give this study a folder of its own with "
                          "--study=NAME")


def refuse_stale(path, held, asked):
    """A run that is there already must be the one that is asked for."""
    remedy = "delete that folder to run it again, or give --study=NAME"
    if [load_plugin(file) for file in asked["plugin"]] != held.get("plugin_sha256", []):
        raise ConfigError(f"{path} was run with another version of the plugin; {remedy}")
    for key in sorted(asked.keys() & held.keys() - FREE_KEYS):
        if asked[key] not in (held[key], "auto"):
            raise ConfigError(f"{path} was run with {key} {held[key]!r}, not {asked[key]!r}; {remedy}")


def train_hash(config):
    """The sha256 of the training text, None where it is not made yet. There must be a test split."""
    folder = os.path.join("data", config["dataset"])
    if not os.path.isdir(folder):
        return None
    data, meta = load_data(config["dataset"], config["block_size"])
    if "test" not in data:
        raise ConfigError(f"{folder} has no test split, which a study reads once, at the end of each run; "
                          "make one with prepare.py")
    return meta["splits"]["train"]["sha256"]
