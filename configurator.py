"""Configuration: the defaults of a script, then config files in their order, then --key=value, which wins.

A config file is Python. It is run with the keys that are set so far as its variables, so `max_iters = 4 *
backbone_iters` and `controlled = list(range(1, 15))` work, and what its keys are at its end counts. An
unknown or mistyped key is refused, in a file as on the command line. A file that sets `scale` is a scale, one
that sets `recipe` a recipe.

Also here, because everything else builds on it: the clear error, the registries, plugins, and the table of
arms.
"""
import ast
import configparser
import copy
import difflib
import glob
import importlib.util
import math
import os
import sys
import traceback
import types

HERE = os.path.dirname(os.path.abspath(__file__))


# -----------------------------------------------------------------------------
# the clear error

class ConfigError(Exception):
    """What a user typed or handed over is wrong. `exit_on_error` makes it one line on stderr, exit code 2."""


def exit_on_error(main):
    """Run main(). A ConfigError becomes one line; whatever else goes wrong is an ordinary traceback."""
    try:
        main()
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:  # whoever read our output has gone, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)


def did_you_mean(name, choices):
    choices = [str(choice) for choice in choices]
    near = difflib.get_close_matches(str(name), choices, n=1, cutoff=0.5)
    if near:
        return f"did you mean {near[0]!r}?"
    return f"known: {', '.join(sorted(choices))}"


def where_is(kind):
    """The name of a class, and its file: for what a fork registers."""
    return f"{kind.__name__} in {os.path.basename(sys.modules[kind.__module__].__file__)}"


# -----------------------------------------------------------------------------
# registries and plugins

class Registry(dict):
    """Names and the classes that they stand for: `@GATES.register("my_gate")` above a class adds one."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind

    def register(self, name):
        def add(entry):
            if name in self:
                raise ConfigError(f"the {self.kind} {name!r} is registered already; choose another name")
            self[name] = entry
            return entry
        return add

    def __missing__(self, name):
        raise ConfigError(f"--{self.kind}={name!r} is unknown; {did_you_mean(name, self)}; one of your own is "
                          "loaded with --plugin=FILE")


PLUGINS = {}  # the path of each plugin that was loaded -> its text


def load_plugins(words):
    """Run every --plugin=FILE of a command line: Python that registers gates, losses, labels or estimators.
    They come before all other words, because a loss brings a key, lambda_<name>. -> the other words."""
    for word in words:
        if word.startswith("--plugin="):
            load_plugin(word.partition("=")[2])
    return [word for word in words if not word.startswith("--plugin=")]


def load_plugin(path):
    """Run a plugin, once in a process -> its absolute path. What it raises is its own traceback."""
    path = os.path.abspath(os.path.expanduser(path))
    if path in PLUGINS:
        return path
    if not os.path.isfile(path) or not path.endswith(".py"):
        raise ConfigError(f"--plugin={path!r} is no file of Python; name one that ends in .py")
    with open(path, encoding="utf-8") as f:
        PLUGINS[path] = f.read()
    name = f"plugin_{len(PLUGINS)}_{os.path.basename(path)[:-3]}"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return path


# -----------------------------------------------------------------------------
# values

def check_type(key, value, defaults, where):
    """`value` as the type of the key's default, or a ConfigError that names both."""
    if key not in defaults:
        raise ConfigError(f"{where}: unknown key {key!r}; {did_you_mean(key, defaults)}")
    kind = type(defaults[key])
    if kind is float and type(value) is int:
        value = float(value)
    if kind is list and isinstance(value, (tuple, range)):
        value = list(value)
    if type(value) is not kind:
        raise ConfigError(f"{where}: {key} takes {kind.__name__} (such as {defaults[key]!r}), not {value!r}")
    if kind is float and not math.isfinite(value):
        raise ConfigError(f"{where}: {key} takes a finite number, not {value!r}")
    if kind is str and value.startswith(("~/", "hf:~/")):
        return value.replace("~", os.path.expanduser("~"), 1)
    return value


def parse_value(key, text, default, where):
    """The text after `--key=` as a value; a string is taken as it is."""
    if isinstance(default, str):
        return text
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        raise ConfigError(f"{where}: {key} takes {type(default).__name__} (such as {default!r}), not "
                          f"{text!r}") from None
    if isinstance(default, list) and not isinstance(value, (list, tuple)):
        return [value]
    return value


# -----------------------------------------------------------------------------
# config files

def read_file(path, config, defaults):
    """`config` (dict) as the config file at `path` changes it -> (config, the keys that it sets)."""
    path = find_file(path)
    variables = copy.deepcopy(config)
    try:
        with open(path, encoding="utf-8-sig") as f:
            text = f.read()
        assigned = assigned_keys(text, path, config)
        exec(compile(text, path, "exec"), variables)
    except ConfigError:
        raise
    except Exception as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
        line = lines[-1] if lines else getattr(error, "lineno", None) or 1
        raise ConfigError(f"{path}:{line}: {type(error).__name__}: {error}") from None
    keys = set()
    for key, value in variables.items():
        private = key.startswith("_") or isinstance(value, types.ModuleType) or callable(value)
        if not private and (key in assigned or key not in config or value != config[key]):
            config = {**config, key: check_type(key, value, defaults, path)}
            keys.add(key)
    return config, keys


def find_file(path):
    """The path of a config file; config/best.py is also looked for beside this program."""
    for place in (os.path.expanduser(path), os.path.join(HERE, path)):
        if os.path.isfile(place):
            return place
    names = os.listdir(os.path.join(HERE, "config"))
    if f"{path}.py" in names:
        raise ConfigError(f"there is no config file {path!r}; write config/{path}.py")
    if "=" in path:
        raise ConfigError(f"there is no config file {path!r}; a key is written --{path}")
    raise ConfigError(f"there is no config file {path!r}; {did_you_mean(os.path.basename(path), names)}")


def assigned_keys(text, path, config):
    """The names that the lines of a config file assign to; a key that is assigned twice is refused."""
    assigned = set()
    for node in ast.parse(text, path).body:
        targets = node.targets if isinstance(node, ast.Assign) else []
        for key in [target.id for target in targets if isinstance(target, ast.Name)]:
            if key in assigned and key in config:
                raise ConfigError(f"{path}:{node.lineno}: {key} is set twice; set it once")
            assigned.add(key)
    return assigned


# -----------------------------------------------------------------------------
# the command line

def configure(defaults, words):
    """Words of a command line -> (config, the keys that were set by a file or a word).

    Raises ConfigError for whatever would silently run something else than what was meant."""
    refuse_words_without_values(words, defaults)
    config, given, files = dict(defaults), set(), {}  # files: scale or recipe -> the file that set it
    for word in words:
        if word.startswith("-"):
            continue
        config, keys = read_file(word, config, defaults)
        for kind in ("scale", "recipe"):
            if kind in keys and kind in files:
                raise ConfigError(f"{files[kind]} and {word} both set the {kind}; name one, and change it with "
                                  "--key=value")
            if kind in keys:
                files[kind] = word
        if "scale" in keys and "recipe" in files and files["recipe"] != word:
            raise ConfigError(f"{word} sets the scale after a recipe; name the scale file before the recipe")
        given |= keys
    given_words = set()
    for word in words:
        if word.startswith("-"):
            key, value = parse_word(word, defaults)
            if key in given_words:
                raise ConfigError(f"{word!r}: {key} is given twice; give it once")
            given_words.add(key)
            config[key] = value
    recipe = config.get("recipe")
    named_by_file = os.path.basename(files.get("recipe", ""))
    if "recipe" in given_words and os.path.exists(os.path.join(HERE, "config", f"{recipe}.py")) \
            and named_by_file != f"{recipe}.py":
        raise ConfigError(f"--recipe={recipe} only names a run's folder, and config/{recipe}.py is a recipe; "
                          f"write config/{recipe}.py, or choose another name")
    return config, given | given_words


def refuse_words_without_values(words, defaults):
    """`--key value` would be read as a key without a value and a config file."""
    for word, following in zip(words, [*words[1:], None]):
        key = word.lstrip("-")
        if word.startswith("--") and key in defaults and not isinstance(defaults[key], bool):
            value = repr(defaults[key]) if following is None or following.startswith("-") else following
            raise ConfigError(f"{word!r}: {key} needs a value; write --{key}={value}")


def parse_word(word, defaults):
    """--key=value -> (key, value)."""
    key, equals, text = word.lstrip("-").partition("=")
    if key not in defaults or not word.startswith("--"):
        raise ConfigError(f"{word!r}: unknown key {key!r}; {did_you_mean(key, defaults)}")
    if not equals:
        return key, True
    return key, check_type(key, parse_value(key, text, defaults[key], word), defaults, repr(word))


def read_arms():
    """config/arms.ini -> {name: [recipe, --key=value, ...]}: runs that are a recipe and what they change."""
    parser = configparser.ConfigParser(interpolation=None)
    parser.read(os.path.join(HERE, "config", "arms.ini"), encoding="utf-8")
    return {name: line.split() for name, line in parser["arms"].items()}


def recipes(defaults):
    """{name: its config} of the files of config/ that set a recipe."""
    found = {}
    for path in sorted(glob.glob(os.path.join(glob.escape(HERE), "config", "*.py"))):
        config, keys = read_file(path, defaults, defaults)
        if "recipe" in keys:
            found[os.path.basename(path)[:-3]] = config
    return found


def arm_words(arm):
    """The words of train.py's command line that make an arm: a recipe, or a line of config/arms.ini."""
    recipe, *changes = read_arms().get(arm, [arm])
    words = [os.path.join(HERE, "config", f"{recipe}.py"), *changes]
    return words + [f"--recipe={arm}"] * bool(changes)


def show_help_if_asked(words, script):
    """Where --help or -h is among the words, print what the script says of itself and of its keys, and end."""
    if not {"--help", "-h"} & set(words):
        return
    with open(script, encoding="utf-8") as f:
        text = f.read()
    print(ast.get_docstring(ast.parse(text)), end="\n\n")
    _, _, keys = text.partition("\nDEFAULTS = dict(")
    print("Keys and their defaults, each given as --key=value:\n    " + keys.partition("\n)\n")[0].strip())
    sys.exit(0)
