"""Strict configuration: defaults, then config files, then --key=value; later wins.

A config file is a list of `key = expression` lines. An expression is made of literals and of keys that
are already set (`max_iters = 4 * backbone_iters`), so a file can be relative to the scale named before it.
Every mistake is a ConfigError of one line, before anything is read, made or trained.
"""
import ast
import difflib
import math
import os
import sys


PARTS = (ast.Constant, ast.Name, ast.expr_context, ast.List, ast.Tuple, ast.UnaryOp, ast.unaryop, ast.BinOp, ast.operator)  # of an expression


class ConfigError(Exception):
    """Bad input. `exit_on_error` turns it into one line on stderr and exit code 2."""


def exit_on_error(main):
    """Run `main()`; a ConfigError becomes one line on stderr and exit code 2, without a traceback."""
    try:
        main()
    except ConfigError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted: the same command goes on from the last checkpoint", file=sys.stderr)
        sys.exit(130)


def did_you_mean(name, known):
    near = difflib.get_close_matches(str(name), [str(k) for k in known], n=1, cutoff=0.5)
    return f"did you mean {near[0]!r}?" if near else f"known: {', '.join(str(k) for k in sorted(known))}"


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


def read_file(path, base, defaults):
    """Return `base` overridden by the `key = expression` lines of the config file at `path`."""
    try:
        with open(path, encoding="utf-8") as f:
            tree = ast.parse(f.read())
    except OSError as error:
        names = os.listdir("config") if os.path.isdir("config") else []
        hint = did_you_mean(os.path.basename(path), names) if names else "name a file"
        raise ConfigError(f"cannot read the config file {path!r} ({error.strerror}); {hint}") from None
    except (SyntaxError, ValueError, MemoryError, RecursionError) as error:  # ValueError: null bytes, or bytes that are not UTF-8
        raise ConfigError(f"{path} is not a config file ({error}); it takes `key = value` lines") from None
    config = dict(base)
    for node in tree.body:
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            continue  # a docstring
        if not (isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name)):
            raise ConfigError(f"{path}:{node.lineno}: a config file takes only `key = value` lines and comments")
        key = node.targets[0].id
        try:
            for part in ast.walk(node.value):
                if not isinstance(part, PARTS) or isinstance(part, ast.Pow):
                    raise ValueError(f"it holds a {type(part).__name__}")
            value = eval(compile(ast.Expression(node.value), path, "eval"), {"__builtins__": {}}, config)
        except Exception as error:
            raise ConfigError(f"{path}:{node.lineno}: cannot evaluate the value of {key!r} ({error}); "
                              "use literals and keys that are already set") from None
        if key == "scale" and config["recipe"] != defaults["recipe"]:
            raise ConfigError(f"{path} sets the scale after a recipe; name the scale file before the recipe")
        config[key] = check(key, value, defaults, f"{path}:{node.lineno}")
    return config


def parse_value(key, text, default, where):
    """The text after `--key=` as the type of `default`; strings are taken as they are."""
    if isinstance(default, str):
        return text
    try:
        value = ast.literal_eval(text)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        raise ConfigError(f"{where}: {key} takes {type(default).__name__} (such as {default!r}), "
                          f"not {text!r}") from None
    return [value] if isinstance(default, list) and not isinstance(value, (tuple, list)) else value


def configure(defaults, argv):
    """defaults (dict) and command-line words -> resolved config (dict); raises ConfigError."""
    config = dict(defaults)
    for word in (w for w in argv if not w.startswith("--")):
        config = read_file(word, config, defaults)
    seen = set()
    for word in (w for w in argv if w.startswith("--")):
        key, equals, text = word[2:].partition("=")
        if key in seen:
            raise ConfigError(f"{word!r}: {key} is given twice; give it once")
        seen.add(key)
        if key not in defaults:
            raise ConfigError(f"{word!r}: unknown key {key!r}; {did_you_mean(key, defaults)}")
        if not equals and not isinstance(defaults[key], bool):
            raise ConfigError(f"{word!r}: {key} needs a value, --{key}=VALUE (such as {defaults[key]!r})")
        value = parse_value(key, text, defaults[key], word) if equals else True
        config[key] = check(key, value, defaults, repr(word))
    return config
