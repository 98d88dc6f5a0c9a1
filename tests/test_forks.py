"""Forks without edits: what a plugin registers works from training to sampling, its errors are its own, and
the README's forks run as printed."""
import json
import re
import shlex
import traceback

import pytest
import torch

from configurator import ConfigError
from conftest import HERE, finish, go, losses_of, recipe, start, steps_of, summary_of, tiny, write_plugin

README = (HERE / "README.md").read_text(encoding="utf-8")

EVERYTHING = '''
import torch
import torch.nn as nn

from gates import (ESTIMATORS, GATES, LABELS, LOSSES, Estimator, Gate, Loss, OffPolicyLabel, mean,
                   straight_through)


@GATES.register("position")
class PositionGate(Gate):
    """A learned score for each position, and a linear one."""

    def __init__(self, config, layer):
        super().__init__(config, layer)
        self.score = nn.Embedding(config.block_size, 1)
        self.slope = nn.Linear(config.n_embd, 1)

    def forward(self, h, context):
        positions = torch.arange(context.start, context.start + h.size(1), device=h.device)
        return (self.score(positions) + self.slope(h)).squeeze(-1), None


@ESTIMATORS.register("tanh")
class Tanh(Estimator):
    reads_both = True

    def __call__(self, scores, mask):
        return straight_through(mask, scores.tanh())


@LABELS.register("doubled")
class Doubled(OffPolicyLabel):
    def __call__(self, trace, route):
        return 2 * super().__call__(trace, route)


@LOSSES.register("small")
class Small(Loss):
    weight = 0.25

    def __call__(self, trace):
        return mean(route.scores.square().mean() for route in trace.routes)
'''
OF_IT = ["--gate=position", "--estimator=tanh", "--oracle=doubled", "--recipe=mine"]
RUN = "out/tiny/mine/seed0"


# -----------------------------------------------------------------------------
# what a plugin registers, from training to sampling

def test_a_plugin_of_everything_works_end_to_end(place, forget):
    plugin = write_plugin(EVERYTHING)
    words = tiny(plugin, *OF_IT)
    go("train", *words, "--lambda_small=0.5")
    record = json.loads((place / RUN / "config.json").read_text())
    assert record["plugins"] == {f"{place}/mine.py": EVERYTHING}  # its text stands in the run
    assert record["config"]["plugin"] == [f"{place}/mine.py"] and record["config"]["lambda_small"] == 0.5
    steps = steps_of(RUN)
    assert len(steps) == 6
    for step in steps:
        assert step["losses"].keys() == {"lm", "util", "rank", "small"} and "label_correlation" in step
        assert step["grad_norm"]["gate"] > 0
    forget()
    assert "finished already" in go("train", *words, "--lambda_small=0.5")
    forget()
    out = go("train", *words, "--lambda_small=0.5", "--eval_only", "--budget=0.25")
    assert json.loads(out.splitlines()[-1])["val"]["topk"]["budget"] == [0.25, 0.25]
    forget()
    assert go("sample", RUN, "--max_new_tokens=4")  # it finds the plugin in the run's config
    forget()
    with pytest.raises(ConfigError, match="unknown key 'lambda_small'"):
        go("train", *tiny("--lambda_small=0.5"))
    with pytest.raises(ConfigError, match="--gate='position' is unknown.*--plugin=FILE"):
        go("train", *tiny("--gate=position"))


def test_a_changed_plugin_is_refused_and_a_moved_one_is_not(place, forget):
    plugin = write_plugin(EVERYTHING)
    words = tiny(plugin, *OF_IT)
    go("train", *words)
    forget()
    write_plugin(EVERYTHING.replace("2 * super", "3 * super"))
    for command in (["train", *words], ["train", *words, "--eval_only"], ["sample", RUN]):
        with pytest.raises(ConfigError, match="plugin"):
            go(*command)
        forget()
    (place / "mine.py").unlink()
    moved = tiny(write_plugin(EVERYTHING, "moved.py"), *OF_IT)
    assert "finished already" in go("train", *moved)
    forget()
    assert '"val"' in go("train", *moved, "--eval_only")


LOSS = '''
from gates import LOSSES, Loss


@LOSSES.register("{}")
class Mine(Loss):
    weight = 0.5

    def __call__(self, trace):
        scores = trace.routes[0].scores
        return {}
'''


def test_several_plugins_bring_their_keys_whatever_their_place_on_the_line(place, forget):
    one, two = (write_plugin(LOSS.format(name, "scores.mean()"), f"{name}.py") for name in ("one", "two"))
    go("train", *tiny("--lambda_two=0.0", one, "--recipe=mine", "--max_iters=2", two, one))
    assert set(steps_of(RUN)[0]["losses"]) == {"lm", "jepa", "util", "rank", "one"}


def test_a_name_that_is_taken_is_refused(place, forget):
    text = "from gates import GATES, MLPGate\n\nGATES.register('g1')(MLPGate)\n"
    with pytest.raises(ConfigError, match="the gate 'g1' is registered already"):
        go("train", *tiny(write_plugin(text)))


# -----------------------------------------------------------------------------
# a fork's error is the fork's

GATE = '''
import torch
import torch.nn as nn
from gates import GATES, Gate


@GATES.register("mine")
class Mine(Gate):
    def __init__(self, config, layer):
        super().__init__(config, layer)
        self.score = nn.Linear(config.n_embd, 1)

    def forward(self, h, context):
        {}
'''


@pytest.mark.parametrize("text, error, line", [
    ("x = 1\ny = no_such_name\n", NameError, 2),
    ("def forward(:\n", SyntaxError, 1),
    ("import no_such_module\n", ModuleNotFoundError, 1),
    (GATE.format("return self.score(h[..., 1:]).squeeze(-1), None"), RuntimeError, 14),  # a wrong shape
    (GATE.format("open('no/such/file')"), OSError, 14),
    (GATE.format("raise MemoryError"), MemoryError, 14)])
def test_an_error_in_a_plugin_is_a_traceback_to_its_line(text, error, line, place, forget):
    plugin = write_plugin(text, "my_gate.py")
    with pytest.raises(error) as raised:
        go("train", *tiny(recipe("g1_no_utilrank"), plugin, "--gate=mine", "--recipe=mine"))
    places = [(frame.filename, frame.lineno) for frame in traceback.extract_tb(raised.value.__traceback__)]
    if error is SyntaxError:
        places.append((raised.value.filename, raised.value.lineno))
    assert (str(place / "my_gate.py"), line) in places


def test_the_same_from_a_shell(place):
    plugin = write_plugin("x = 1\ny = no_such_name\n", "my_gate.py")
    code, _, err = finish(start(HERE / "train.py", *tiny(plugin)))
    assert code == 1 and f'File "{place}/my_gate.py", line 2' in err and err.endswith("is not defined\n")


@pytest.mark.parametrize("returned", ["self.score(h)", "self.score(h), None", "self.score(h)[:, 0, 0], None",
                                      "self.score(h).squeeze(-1)"])
def test_a_gate_that_returns_something_else_is_named_with_its_file(returned, place, forget):
    plugin = write_plugin(GATE.format(f"return {returned}"), "my_gate.py")
    with pytest.raises(ConfigError, match=r"gate 'mine' \(Mine in my_gate.py\) must return scores \(B, T\)"):
        go("train", *tiny(recipe("g1_no_utilrank"), plugin, "--gate=mine", "--recipe=mine"))


@pytest.mark.parametrize("shape", ["[:, 0]", "[..., None]", "[:, 1:]"])
def test_a_label_of_another_shape_is_named_with_its_file(shape, place, forget):
    text = ("from gates import LABELS, Label\n\n\n@LABELS.register('mine')\nclass Mine(Label):\n"
            f"    def __call__(self, trace, route):\n        return route.h.norm(dim=-1){shape}\n")
    plugin = write_plugin(text, "my_label.py")
    with pytest.raises(ConfigError, match=r"'mine' \(Mine in my_label.py\) must be \(B, T\) = \(4, 16\)"):
        go("train", *tiny(recipe("g1_full_aux"), plugin, "--oracle=mine", "--recipe=mine"))


@pytest.mark.parametrize("returned, got", [
    ("scores.square().mean(1)", r"shape \(4,\)"), ("None", "NoneType"), ("1.5", "float"),
    ("scores.detach().mean()", "detached")])
def test_a_loss_that_cannot_teach_is_named_with_its_file(returned, got, place, forget):
    plugin = write_plugin(LOSS.format("mine", returned), "my_loss.py")
    with pytest.raises(ConfigError, match=rf"loss 'mine' \(Mine in my_loss.py\) must return a scalar.*{got}"):
        go("train", *tiny(plugin, "--recipe=mine"))


def test_a_gate_without_a_gradient_says_learned_false(place, forget):
    text = GATE.format("return h.mean(-1), None")
    words = tiny(recipe("g1_no_utilrank"), "--gate=mine", "--recipe=mine")
    with pytest.raises(ConfigError, match=r"\(Mine in my_gate.py\) carry no gradient.*say learned = False"):
        go("train", *words, write_plugin(text, "my_gate.py"))
    forget()
    said = text.replace("class Mine(Gate):", "class Mine(Gate):\n    learned = False\n")
    go("train", *words, write_plugin(said, "my_gate.py"), "--overwrite")
    assert summary_of(RUN)["steps"] == 6


# -----------------------------------------------------------------------------
# the README's forks, as printed

def readme_plugins():
    """{file name: code} of the README's blocks that are a plugin."""
    return {name: code for code, name in re.findall(r"```python\n(# (my_\w+\.py).*?)```", README, re.DOTALL)}


def readme_commands(script):
    """The words after `python <script>` of the README's commands with a plugin."""
    commands = re.findall(rf"^python {script} (.*--plugin=.*)$", README, re.MULTILINE)
    return [shlex.split(words, comments=True) for words in commands]


def test_the_readmes_forks_run_as_printed(place, forget):
    plugins = readme_plugins()
    assert plugins.keys() == {"my_gate.py", "my_loss.py", "my_label.py"}
    for name, code in plugins.items():
        (place / name).write_text(code)
    commands = readme_commands("train.py")
    assert {f"--plugin={name}" for name in plugins} <= {word for words in commands for word in words}
    for words in commands:
        forget()
        go("train", *tiny(*words))
    assert len(losses_of("out/tiny/my_loss/seed0", "spread")) == 6
    weights = torch.load("out/tiny/my_gate/seed0/ckpt.pt", weights_only=True)["model"]
    assert "h.1.gate.score.weight" in weights
    assert all("label_correlation" in step for step in steps_of("out/tiny/my_label/seed0"))
    record = json.loads((place / "out/tiny/my_label/seed0/config.json").read_text())
    assert record["config"]["oracle"] == "distance"


# -----------------------------------------------------------------------------
# the contract's tests over plugins

BROKEN = '''
from gates import GATES, LABELS, LOSSES, Label, Loss, MLPGate, mean


@GATES.register("peeking")
class PeekingGate(MLPGate):
    def forward(self, h, context):
        scores, _ = super().forward(h, context)
        return scores - scores.mean(1, keepdim=True), None


@GATES.register("in_place")
class InPlaceGate(MLPGate):
    def forward(self, h, context):
        return super().forward(h.mul_(0.9), context)


@GATES.register("misshapen")
class MisshapenGate(MLPGate):
    def forward(self, h, context):
        return self.net(h), None


@GATES.register("double")
class DoubleGate(MLPGate):
    def forward(self, h, context):
        return super().forward(h, context)[0].double(), None


@LABELS.register("batchwise")
class Batchwise(Label):
    def __call__(self, trace, route):
        return route.scores.detach() - route.scores.detach().mean()


@LOSSES.register("summed")
class Summed(Loss):
    def __call__(self, trace):
        return mean(route.scores.square().sum() for route in trace.routes)


@LOSSES.register("leaking")
class Leaking(Loss):
    def __call__(self, trace):
        return trace.x.square().mean()
'''
BREAKS = ["peeking", "in_place", "misshapen", "double", "batchwise", "summed", "leaking"]
KEEPS = ["my_gate", "spread", "distance", "position", "tanh", "doubled", "small"]


def test_the_contract_passes_the_forks_of_the_readme_and_fails_what_breaks_it(tmp_path):
    """In a process of its own, where only the tests of these names run."""
    files = readme_plugins() | {"everything.py": EVERYTHING, "broken.py": BROKEN}
    plugins = [write_plugin(code, tmp_path / name) for name, code in files.items()]
    assert ["--plugin=my_gate.py"] in [words[-1:] for words in readme_commands("-m pytest")]
    names = f"({' or '.join([*KEEPS, *BREAKS])}) and not (llama or dtype1 or scaled or hard or ste-)"
    words = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--tb=no", "-k", names, *plugins]
    tests = start("-m", "pytest", HERE / "test_routing.py", "--rootdir", HERE, *words, cwd=tmp_path)
    code, printed, _ = finish(tests, timeout=300)
    failed = re.findall(r"^FAILED \S+::(\S+)", printed, re.MULTILINE)
    assert code == 1 and int(re.search(r"(\d+) passed", printed).group(1)) > 50, printed[-3000:]
    for name in BREAKS:
        assert any(name in test for test in failed), (name, failed)
    assert not [test for test in failed if not any(name in test for name in BREAKS)], failed
