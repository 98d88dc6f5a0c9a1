"""Forks without edits: what a plugin registers works from training to sampling and stands under the tests of
the contract, a plugin that cannot work is refused in one line, and the README's forks run as printed."""
import re
import shlex

import pytest

from configurator import PLUGINS, ConfigError, configure
from conftest import (HERE, checkpoint_of, config_of, finish, go, losses_of, start, steps_of, summary_of,
                      tiny)
from gates import ESTIMATORS, GATES, LABELS, LOSSES, TARGETS
from train import DEFAULTS

REGISTRIES = (GATES, ESTIMATORS, LABELS, TARGETS, LOSSES, PLUGINS)
README = (HERE / "README.md").read_text(encoding="utf-8")

EVERYTHING = '''
import torch
import torch.nn as nn

from gates import (ESTIMATORS, GATES, LABELS, LOSSES, TARGETS, Gate, off_policy_label, straight_through)


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


@ESTIMATORS.register("tanh", reads_both=True)
def tanh(scores, mask):
    return straight_through(mask, scores.tanh())


@LABELS.register("doubled", suffix="full")
def doubled(step, route):
    return 2 * off_policy_label(step, route)


@TARGETS.register("again")
def again(step):
    return step.context.tokens


@LOSSES.register("small", weight=0.25)
def small(step):
    return sum(route.scores.square().mean() for route in step.routes) / len(step.routes)
'''
OF_IT = ["--gate=position", "--estimator=tanh", "--oracle=doubled", "--label_target=again"]


@pytest.fixture
def fresh():
    """A call that forgets every plugin, as another process would; they are forgotten after the test too."""
    before = [dict(registry) for registry in REGISTRIES]

    def forget():
        for registry, entries in zip(REGISTRIES, before):
            registry.clear()
            registry.update(entries)
    yield forget
    forget()


# -----------------------------------------------------------------------------
# what a plugin registers, from training to sampling

def test_a_plugin_of_everything_works_end_to_end(place, fresh):
    (place / "mine.py").write_text(EVERYTHING)
    words = tiny("--plugin=mine.py", *OF_IT, "--recipe=mine", "--lambda_small=0.5")
    run = "out/tiny/mine/seed0"
    go("train", *words)
    config = config_of(run)
    assert config["plugin"] == ["mine.py"] and len(config["plugin_sha256"][0]) == 64
    steps = steps_of(run)
    assert len(steps) == 6
    for step in steps:
        assert step["losses"].keys() == {"lm", "util", "rank", "small"} and "label_correlation" in step
        assert step["grad_norm"]["gate"] > 0
    assert any(".gate.score" in name for name in checkpoint_of(run)["model"])
    assert summary_of(run)["realised_budget"].keys() == {"topk", "threshold"}

    fresh()
    assert "finished already" in go("train", *words)
    fresh()
    assert '"budget": 0.25' in go("train", *words, "--eval_only", "--budget=0.25")
    fresh()
    assert go("sample", run, "--max_new_tokens=8")  # it finds the plugin in the run's config
    fresh()
    with pytest.raises(ConfigError, match="unknown key 'lambda_small'"):
        go("train", *(word for word in words if "plugin" not in word))
    with pytest.raises(ConfigError, match="--gate='position' is unknown"):
        go("train", *(word for word in words if "plugin" not in word and "small" not in word))


def test_a_run_whose_plugin_has_changed_is_neither_resumed_nor_looked_at(place, fresh):
    (place / "mine.py").write_text(EVERYTHING)
    words = tiny("--plugin=mine.py", *OF_IT, "--recipe=mine")
    go("train", *words)
    fresh()
    (place / "mine.py").write_text(EVERYTHING.replace("2 * off_policy_label", "3 * off_policy_label"))
    with pytest.raises(ConfigError, match="plugin"):
        go("train", *words)
    with pytest.raises(ConfigError, match="mine.py has changed"):
        go("sample", "out/tiny/mine/seed0", "--max_new_tokens=8")
    assert config_of("out/tiny/mine/seed0")["plugin"] == ["mine.py"]


def test_several_plugins_bring_their_keys_whatever_their_place_on_the_line(place, fresh):
    for name in ("one", "two"):
        (place / f"{name}.py").write_text(f"""
from gates import LOSSES

@LOSSES.register("{name}", weight=0.5)
def loss(step):
    return sum(route.scores.square().mean() for route in step.routes)
""")
    words = ["--lambda_two=0.0", "--plugin=one.py", "--recipe=mine", "--max_iters=2", "--plugin=two.py"]
    go("train", *tiny(*words))
    assert set(steps_of("out/tiny/mine/seed0")[0]["losses"]) == {"lm", "jepa", "util", "rank", "one"}
    assert config_of("out/tiny/mine/seed0")["lambda_one"] == 0.5 and len(PLUGINS) == 2


# -----------------------------------------------------------------------------
# what is refused, each with a line that names the file

LOSS = "from gates import LOSSES\n\n@LOSSES.register({!r}{})\ndef loss(step):\n    return 0\n"


@pytest.mark.parametrize("text,message", [
    (None, "cannot be read"),
    ("def forward(:\n", "SyntaxError"),
    ("import no_such_module\n", "no_such_module"),
    ("from gates import MLP\n", "MLP"),
    ("1 / 0\n", "division by zero"),
    (LOSS.format("lm", ""), "the loss 'lm' is registered already"),
    (LOSS.format("new", "") + LOSS.format("new", ""), "the loss 'new' is registered already"),
    (LOSS.format("new", ", wieght=1.0"), "a loss has no flag 'wieght'; did you mean 'weight'?"),
    ("from gates import GATES, MLPGate\n\nGATES.register('g1')(MLPGate)\n", "the gate 'g1' is registered"),
    ("import gates\n\ngates.ESTIMATORS.register('x', reads_all=True)(gates.hard)\n", "flag 'reads_all'"),
    ("import gates\n\ngates.LABELS.register('x', sufix='full')(gates.hard)\n", "did you mean 'suffix'?")])
def test_a_plugin_that_cannot_be_loaded_is_refused_in_one_line(place, fresh, text, message):
    if text is not None:
        (place / "bad.py").write_text(text)
    with pytest.raises(ConfigError) as error:
        go("train", *tiny("--plugin=bad.py"))
    line = str(error.value)
    assert message in line and "bad.py" in line and "\n" not in line
    assert not (place / "out" / "tiny" / "g3_full_aux").exists()


def test_a_plugin_is_a_file_of_python_named_on_the_command_line(place, fresh):
    (place / "mine.txt").write_text(EVERYTHING)
    with pytest.raises(ConfigError, match="mine.txt.* must end in .py"):
        go("train", *tiny("--plugin=mine.txt"))
    with pytest.raises(ConfigError, match="cannot be read"):
        go("train", *tiny("--plugin=."))
    (place / "recipe.py").write_text("plugin = ['mine.py']\n")
    with pytest.raises(ConfigError, match="a plugin is named on the command line"):
        configure(DEFAULTS | {"plugin": []}, ["recipe.py"])


def test_two_plugins_of_one_name_are_refused_and_the_same_file_twice_is_one(place, fresh):
    for name in ("a", "b"):
        (place / f"{name}.py").write_text(LOSS.format("new", ""))
    with pytest.raises(ConfigError, match="b.py.*the loss 'new' is registered already"):
        go("train", *tiny("--plugin=a.py", "--plugin=b.py"))
    fresh()
    go("train", *tiny("--plugin=a.py", "--plugin=./a.py", "--max_iters=1", "--recipe=mine"))


# -----------------------------------------------------------------------------
# the README's forks, as printed

def readme_plugins():
    """{file name: code} of the README's blocks that are a plugin."""
    blocks = re.findall(r"```python\n(# (my_\w+\.py):.*?)```", README, re.DOTALL)
    return {name: code for code, name in blocks}


def readme_commands(script):
    """The words after `python <script>` of the README's commands with a plugin."""
    lines = [line for line in README.splitlines() if line.startswith(f"python {script}")]
    lines = [line for line in lines if "--plugin=" in line]
    return [shlex.split(line)[len(script.split()) + 1:] for line in lines]


def test_the_readme_has_a_gate_a_loss_and_a_label_of_at_most_15_lines():
    plugins = readme_plugins()
    assert plugins.keys() == {"my_gate.py", "my_loss.py", "my_label.py"}
    assert all(len(code.splitlines()) <= 15 for code in plugins.values())


def test_the_readmes_training_commands_run_as_printed(place, fresh):
    for name, code in readme_plugins().items():
        (place / name).write_text(code)
    commands = readme_commands("train.py")
    assert [words[1] for words in commands] == [f"--plugin={name}" for name in readme_plugins()]
    for words in commands:
        fresh()
        go("train", *tiny(*words))
    losses = {name: losses_of("out/tiny/my_loss/seed0", name) for name in ("lm", "spread")}
    assert all(len(values) == 6 for values in losses.values())
    assert config_of("out/tiny/my_loss/seed0")["lambda_spread"] == 0.3
    assert "h.1.gate.score.weight" in checkpoint_of("out/tiny/my_gate/seed0")["model"]
    assert all("label_correlation" in step for step in steps_of("out/tiny/my_label/seed0"))
    assert config_of("out/tiny/my_label/seed0")["oracle"] == "distance"


# -----------------------------------------------------------------------------
# the contract's tests over plugins

BROKEN = '''
import torch.nn as nn

from gates import ESTIMATORS, GATES, LABELS, LOSSES, MLPGate


@GATES.register("peeking")
class PeekingGate(MLPGate):
    def forward(self, h, context):
        scores, _ = super().forward(h, context)
        return scores - scores.mean(1, keepdim=True), None


@ESTIMATORS.register("unsaid")
def unsaid(scores, mask):
    p = scores.sigmoid()
    return mask.float() + p - p.detach()


@LABELS.register("batchwise")
def batchwise(step, route):
    return route.scores.detach() - route.scores.detach().mean()


@LOSSES.register("summed")
def summed(step):
    return sum(route.scores.square().sum() for route in step.routes)


@LOSSES.register("leaking")
def leaking(step):
    return step.x.square().mean()
'''
BREAKS = {"peeking": ["scores_are_finite", "threshold_never_looks_ahead"],
          "unsaid": ["an_estimator_is_what_its_flags_say", "gathered_equals_masked"],
          "batchwise": ["takes_each_row_alone"], "summed": ["mean_over_slices"],
          "leaking": ["trains_what_it_is_about"]}
KEEP = ["my_gate", "spread", "distance", "position", "tanh", "doubled", "again", "small"]


def test_the_contract_passes_the_forks_of_the_readme_and_fails_what_breaks_it(tmp_path):
    """In one process of its own, where nothing but the tests of these names is run."""
    files = readme_plugins() | {"everything.py": EVERYTHING, "broken.py": BROKEN}
    for name, code in files.items():
        (tmp_path / name).write_text(code)
    assert readme_commands("-m pytest -q test_routing.py") == [["--plugin=my_gate.py"]]
    words = ["-q", "-p", "no:cacheprovider", "-k", " or ".join([*KEEP, *BREAKS])]
    words += [f"--plugin={name}" for name in files]
    tests = start("-m", "pytest", HERE / "test_routing.py", "--rootdir", HERE, *words, cwd=tmp_path)
    code, printed, _ = finish(tests, timeout=500)
    failed = re.findall(r"^FAILED \S+::(\S+)", printed, re.MULTILINE)
    assert code == 1 and int(re.search(r"(\d+) passed", printed).group(1)) > 100
    for name, tests in BREAKS.items():
        for test in tests:
            assert any(test in line and name in line for line in failed), (name, test, failed)
    assert all(any(name in line for name in BREAKS) for line in failed), failed
