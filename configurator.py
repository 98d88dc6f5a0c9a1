"""Strict configuration: defaults, then config files in their order, then --key=value, which always wins.

A config file is a list of `key = expression` lines. An expression is made of literals and of keys that are
already set (`max_iters = 4 * backbone_iters`), so a file can be relative to the scale named before it. Every
mistake is a ConfigError of one line, before anything is read, made or trained.

Also here, because everything else builds on it: the registries, plugins, and the table of arms.
"""
import ast
import configparser
import difflib
import hashlib
import importlib.util
import math
import os
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
# What the expression of a config file may be made of.
EXPRESSION = (ast.Constant, ast.Name, ast.expr_context, ast.List, ast.Tuple, ast.UnaryOp, ast.unaryop,
              ast.BinOp, ast.Add, ast.Sub, ast.Mult, ast.Div, ast.FloorDiv, ast.Mod)


# -----------------------------------------------------------------------------
# errors

class ConfigError(Exception):
    """Bad input. `exit_on_error` turns it into one line on stderr and exit code 2."""


def exit_on_error(main):
    """Run `main()`. What can go wrong at the edge becomes one line on stderr, without a traceback: exit code
    2."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a terminal that is ASCII shows question marks
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:  # whoever read our output has gone, as `head` does
        let_go_of_stdout()
        sys.exit(141)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        line = one_line(error)
        if line is None:
            raise
        print(f"error: {line}", file=sys.stderr, flush=True)
        let_go_of_stdout()
        sys.exit(2)


def let_go_of_stdout():
    """Where stdout takes nothing more, drop what is left in it, or the interpreter complains at its end."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def on_uncaught(kind, error, trace):
    if issubclass(kind, KeyboardInterrupt):
        print("interrupted", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


sys.excepthook = on_uncaught  # a script imports this file first: from then on Ctrl-C is one line


def one_line(error):
    """What to tell the user of this error; None for a fault of the program, whose traceback is wanted."""
    text = " ".join(str(error).split())
    if isinstance(error, ConfigError):
        return text
    if isinstance(error, MemoryError) or is_out_of_memory(text):
        detail = text[:200] or "MemoryError"
        return f"out of memory ({detail}); give a smaller --batch_size or a smaller model"
    if isinstance(error, OSError):
        where = "that path" if error.filename else "where stdout goes"
        return f"{text}; check {where}, its permissions and the free space"
    return None


def is_out_of_memory(text):
    signs = ("out of memory", "can't allocate memory", "DefaultCPUAllocator",
             "Storage size calculation overflowed", "numel: integer multiplication overflow")
    return any(sign in text for sign in signs)


def did_you_mean(name, choices):
    choices = [str(c) for c in choices]
    near = difflib.get_close_matches(str(name), choices, n=1, cutoff=0.5)
    if near:
        return f"did you mean {near[0]!r}?"
    return f"known: {', '.join(sorted(choices))}"


# -----------------------------------------------------------------------------
# registries and plugins

class Registry(dict):
    """Names and what they stand for: `@GATES.register("my_gate")` adds an entry. Flags become its attributes;
    the registry gives their defaults. A name that is there already is refused."""

    def __init__(self, kind, **flags):
        super().__init__()
        self.kind, self.flags = kind, flags

    def register(self, name, **flags):
        def add(entry):
            if name in self:
                raise ConfigError(f"the {self.kind} {name!r} is registered already; choose another name")
            for flag in flags:
                if flag not in self.flags:
                    raise ConfigError(f"a {self.kind} has no flag {flag!r}; {did_you_mean(flag, self.flags)}")
            for flag, value in {**self.flags, **flags}.items():
                setattr(entry, flag, value)
            self[name] = entry
            return entry
        return add

    def get_or_refuse(self, name):
        if name not in self:
            raise ConfigError(f"--{self.kind}={name!r} is unknown; {did_you_mean(name, self)}")
        return self[name]


PLUGINS = {}  # the real path of each plugin that was loaded -> its sha256


def load_plugin(path):
    """Run a file of Python that registers gates, losses, labels or estimators -> its sha256. Once in a
    process."""
    real = os.path.realpath(path)
    try:
        with open(real, "rb") as f:
            digest = hashlib.sha256(f.read()).hexdigest()
    except OSError as error:
        raise ConfigError(f"--plugin={path!r} cannot be read ({error.strerror}); name a file of "
                          "Python") from None
    if real in PLUGINS:
        return PLUGINS[real]
    name = os.path.splitext(os.path.basename(real))[0]
    spec = importlib.util.spec_from_file_location(f"plugin_{name}", real)
    if spec is None:
        raise ConfigError(f"--plugin={path!r} is no file of Python; its name must end in .py")
    try:
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
    except (Exception, SystemExit) as error:  # whatever the plugin's own code raises
        raise ConfigError(f"--plugin={path!r} cannot be loaded ({type(error).__name__}: {error})") from None
    PLUGINS[real] = digest
    return digest


def load_plugins(words):
    """Load every --plugin=FILE of a command line -> the words without them, and the files. Plugins come
    first: they may bring keys of their own."""
    files = [w.partition("=")[2] for w in words if w.startswith("--plugin=")]
    for path in files:
        load_plugin(path)
    return [w for w in words if not w.startswith("--plugin=")], files


# -----------------------------------------------------------------------------
# arms

def read_arms():
    """config/arms.ini -> {name: [recipe, --key=value, ...]}: runs that are a recipe and what they change."""
    parser = configparser.ConfigParser(interpolation=None)
    parser.read(os.path.join(HERE, "config", "arms.ini"), encoding="utf-8")
    return {name: line.split() for name, line in parser["arms"].items()}


def arm_words(arm):
    """The words of train.py's command line that make an arm: a recipe of config/, or a line of
    config/arms.ini."""
    recipe, *changes = read_arms().get(arm, [arm])
    words = [os.path.join(HERE, "config", f"{recipe}.py"), *changes]
    if changes:
        words.append(f"--recipe={arm}")
    return words


# -----------------------------------------------------------------------------
# files and words

def check(key, value, defaults, where):
    """Return `value` as the type of the default of `key`, or raise a ConfigError that names both."""
    if key not in defaults:
        raise ConfigError(f"{where}: unknown key {key!r}; {did_you_mean(key, defaults)}")
    kind = type(defaults[key])
    if kind is float and type(value) is int:
        value = float(value) if abs(value) < 2 ** 1000 else math.inf
    if type(value) is int and abs(value) >= 2 ** 63:
        raise ConfigError(f"{where}: {key} is beyond 64 bits; give a smaller number")
    if kind is list and isinstance(value, (tuple, list)):
        value = list(value)
    if type(value) is not kind:
        raise ConfigError(f"{where}: {key} takes {kind.__name__} (such as {defaults[key]!r}), not {value!r}")
    if kind is float and not math.isfinite(value):
        raise ConfigError(f"{where}: {key} takes a finite number, not {value!r}")
    return value


def parse_file(path):
    """A config file -> [(line number, key, expression)]. A name such as config/best.py is looked for here
    first and then beside this program."""
    beside = os.path.join(HERE, path)
    try:
        with open(path if os.path.exists(path) else beside, encoding="utf-8-sig") as f:
            tree = ast.parse(f.read())
    except OSError as error:
        hint = did_you_mean(os.path.basename(path), os.listdir(os.path.join(HERE, "config")))
        if "=" in path:
            hint = f"a key is written --{path}"
        raise ConfigError(f"cannot read the config file {path!r} ({error.strerror}); {hint}") from None
    except (SyntaxError, ValueError, MemoryError, RecursionError) as error:  # ValueError: not UTF-8, or nulls
        raise ConfigError(f"{path} is not a config file ({error}); it takes `key = value` lines") from None
    lines = []
    for node in tree.body:
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            continue  # a docstring
        if not isinstance(node, ast.Assign) or not isinstance(node.targets[0], ast.Name) or node.targets[1:]:
            raise ConfigError(f"{path}:{node.lineno}: a config file takes only `key = value` lines and "
                              "comments")
        lines.append((node.lineno, node.targets[0].id, node.value))
    return lines


def check_expression(expression, config):
    """Refuse what is no literal and no arithmetic with numbers: `[1] * 10 ** 9` would fill the memory."""
    for node in ast.walk(expression):
        if not isinstance(node, EXPRESSION):
            raise ValueError(f"it holds a {type(node).__name__}")
        if isinstance(node, ast.BinOp):
            for side in (node.left, node.right):
                value = getattr(side, "value", 0)
                if isinstance(side, ast.Name):
                    value = config.get(side.id, 0)
                if isinstance(side, (ast.List, ast.Tuple)) or isinstance(value, (str, bytes, list)):
                    raise ValueError("arithmetic takes numbers")


def read_file(path, base, defaults):
    """Return `base` overridden by the lines of the config file at `path`."""
    config = dict(base)
    for number, key, expression in parse_file(path):
        try:
            check_expression(expression, config)
            code = compile(ast.Expression(expression), path, "eval")
            value = eval(code, {"__builtins__": {}}, config)
        except Exception as error:  # of any arithmetic
            raise ConfigError(f"{path}:{number}: cannot evaluate the value of {key!r} ({error}); "
                              "use literals and keys that are already set") from None
        if key == "scale" and config["recipe"] != defaults["recipe"]:
            raise ConfigError(f"{path} sets the scale after a recipe; name the scale file before the recipe")
        if key == "plugin":
            raise ConfigError(f"{path}:{number}: a plugin is named on the command line, --plugin=FILE")
        config[key] = check(key, value, defaults, f"{path}:{number}")
    return config


def parse_value(key, text, default, where):
    """The text after `--key=` as the type of `default`; strings are taken as they are."""
    if isinstance(default, str):
        return text
    try:
        value = ast.literal_eval(text)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        raise ConfigError(f"{where}: {key} takes {type(default).__name__} (such as {default!r}), not "
                          f"{text!r}") from None
    if isinstance(default, list) and not isinstance(value, (tuple, list)):
        return [value]
    return value


def configure(defaults, words):
    """defaults (dict) and command-line words -> the resolved config (dict). Raises ConfigError."""
    config = dict(defaults)
    recipe = None  # the file that set it
    for word in words:
        if word.startswith("--"):
            continue
        config = read_file(word, config, defaults)
        sets_recipe = any(key == "recipe" for _, key, _ in parse_file(word))
        if recipe and sets_recipe:
            raise ConfigError(f"{recipe} and {word} are two recipes; name one, change it with --key=value")
        if sets_recipe:
            recipe = word
    given = set()
    for word in words:
        if not word.startswith("--"):
            continue
        key, equals, text = word[2:].partition("=")
        if key in given:
            raise ConfigError(f"{word!r}: {key} is given twice; give it once")
        given.add(key)
        if key == "help":
            raise ConfigError("--help: every key stands with its meaning at the top of the script")
        if key not in defaults:
            raise ConfigError(f"{word!r}: unknown key {key!r}; {did_you_mean(key, defaults)}")
        value = True
        if equals:
            value = parse_value(key, text, defaults[key], word)
        elif not isinstance(defaults[key], bool):
            raise ConfigError(f"{word!r}: {key} needs a value, --{key}=VALUE (such as {defaults[key]!r})")
        config[key] = check(key, value, defaults, repr(word))
    return config
