"""The command line and config files: what is read, what is refused with the way out, and the help."""
import importlib
import shlex
import sys
from pathlib import Path

import pytest

from configurator import ConfigError, configure, exit_on_error
from conftest import HERE, finish, go, snapshot, start, tiny
from run import check_config
from train import DEFAULTS, configure_run

CONFIG = sorted(path.stem for path in (HERE / "config").glob("*.py"))


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def read(text, *words):
    """The config of a file with this text, and of words."""
    Path("mine.py").write_text(text)
    return configure(DEFAULTS, ["mine.py", *words])


def line_of(error):
    line = str(error.value)
    assert "\n" not in line
    return line


# -----------------------------------------------------------------------------
# config files

def test_a_config_file_is_python_over_the_keys_set_so_far():
    config, given = read('''
import math
from math import sqrt
_base = "my"  # a name of the file's own begins with _
scale = _base + "-" + "scale"
n_layer = 12
controlled = list(range(1, n_layer - 1))
learning_rate = 3e-2 * 8 ** 0.5
gate_lr = sqrt(4) / 10
max_iters = 4 * backbone_iters
backbone_lr *= 2
if n_layer > 6:
    lambda_rank = math.pi
plugin = []
lambda_util, seed = 2, 7
''')
    assert config["scale"] == "my-scale" and config["controlled"] == list(range(1, 11))
    assert config["learning_rate"] == 3e-2 * 8 ** 0.5 and config["gate_lr"] == 0.2
    assert config["max_iters"] == 4 * DEFAULTS["backbone_iters"] and config["backbone_lr"] == 2e-2
    assert config["lambda_rank"] > 3.14 and config["seed"] == 7
    assert config["lambda_util"] == 2.0 and type(config["lambda_util"]) is float
    assert given >= {"scale", "n_layer", "controlled", "backbone_lr"} and "muon_lr" not in given


@pytest.mark.parametrize("text, value", [
    ("[i for i in range(5) if i % 2]", [1, 3]), ("range(1, 4)", [1, 2, 3]), ("(2, 3)", [2, 3]),
    ("sorted({3, 1})", [1, 3]), ("controlled + [6]", [1, 2, 3, 4, 5, 6])])
def test_a_list_may_be_written_in_many_ways(text, value):
    assert read(f"controlled = {text}")[0]["controlled"] == value


def test_a_list_changed_in_place_changes_no_default():
    assert read("controlled.append(6)")[0]["controlled"] == [1, 2, 3, 4, 5, 6]
    assert DEFAULTS["controlled"] == [1, 2, 3, 4, 5]


def test_the_command_line_wins_and_a_later_file_builds_on_an_earlier_one():
    Path("wide.py").write_text("scale = 'wide'\nn_embd = 256\nmax_iters = 100\n")
    Path("long.py").write_text("recipe = 'long'\nmax_iters = 3 * max_iters\n")
    config, _ = configure(DEFAULTS, ["--gate_lr=1", "wide.py", "long.py", "--n_embd=512"])
    assert (config["n_embd"], config["max_iters"], config["gate_lr"]) == (512, 300, 1.0)


@pytest.mark.parametrize("name", CONFIG)
def test_every_config_of_ours_resolves(name):
    config, given = configure(DEFAULTS, [f"config/{name}.py"])  # found beside the program
    assert name in (config["recipe"], config["scale"])
    if config["controlled"]:  # [] is filled in by the backbone's shape
        check_config(config)


@pytest.mark.parametrize("text, says", [
    ("n_layer = 3\nsed = 1\n", ["mine.py", "unknown key 'sed'", "did you mean 'seed'"]),
    ("seed = '1'\n", ["mine.py", "seed takes int", "'1'"]),
    ("max_iters = 2.5\n", ["mine.py", "max_iters takes int", "2.5"]),
    ("compile = 1\n", ["mine.py", "compile takes bool"]),
    ("learning_rate = 1e999\n", ["mine.py", "finite"]),
    ("controlled = {1, 2}\n", ["mine.py", "controlled takes list"]),
    ("seed = 1\nn_layer = 3\nseed = 2\n", ["mine.py:3", "seed is set twice"]),
    ("seed = 1\nn_layer = 1 // 0\n", ["mine.py:2", "ZeroDivisionError"]),
    ("seed = sead + 1\n", ["mine.py:1", "NameError", "sead"]),
    ("n_layer = 3\nseed = = 3\n", ["mine.py:2", "SyntaxError"]),
    ("import no_such_module\n", ["mine.py:1", "no_such_module"])])
def test_a_config_file_that_cannot_be_meant_is_refused_with_its_place(text, says):
    with pytest.raises(ConfigError) as error:
        read(text)
    assert all(word in line_of(error) for word in says), line_of(error)


def test_a_file_that_is_no_config_is_refused():
    for content in (b"seed = 1\0", bytes(range(128, 256)), b'{"seed": '):
        Path("mine.py").write_bytes(content)
        with pytest.raises(ConfigError, match="mine.py:1"):
            configure(DEFAULTS, ["mine.py"])
    with pytest.raises(ConfigError, match="there is no config file '.'"):
        configure(DEFAULTS, ["."])


# -----------------------------------------------------------------------------
# words

def refused(words):
    with pytest.raises(ConfigError) as error:
        configure_run(shlex.split(words))
    return line_of(error)


@pytest.mark.parametrize("words, says", [
    ("--lerning_rate=1", ["unknown key 'lerning_rate'", "did you mean 'learning_rate'"]),
    ("--zzzzz=1", ["unknown key 'zzzzz'", "known: "]),
    ("--lambda_utl=1", ["did you mean 'lambda_util'"]),
    ("-seed=1", ["unknown key 'seed'"]),
    ("--max_iters=ten", ["max_iters takes int", "'ten'"]),
    ("--max_iters=2.5", ["max_iters takes int", "2.5"]),
    ("--max_iters=True", ["max_iters takes int", "True"]),
    ("--max_iters=", ["max_iters takes int"]),
    ("--controlled=all", ["controlled takes list", "'all'"]),
    ("--compile=1", ["compile takes bool"]),
    ("--learning_rate=nan", ["learning_rate takes float"]),
    ("--gate_lr=1e999", ["gate_lr takes a finite number"]),
    ("--seed=1 --seed=2", ["--seed=2", "given twice"]),
    ("--max_iters 5", ["max_iters needs a value", "--max_iters=5"]),
    ("--plugin my_gate.py", ["plugin needs a value", "--plugin=my_gate.py"]),
    ("--max_iters", ["max_iters needs a value", "--max_iters=150"]),
    ("best", ["'best'", "write config/best.py"]),
    ("max_iters=5", ["'max_iters=5'", "--max_iters=5"]),
    ("config/bestt.py", ["config/bestt.py", "did you mean 'best.py'"]),
    ("--recipe=best", ["config/best.py is a recipe", "write config/best.py"]),
    ("config/g1_full_aux.py --recipe=best", ["write config/best.py"]),
    ("config/paper.py config/web.py", ["config/paper.py and config/web.py both set the scale"]),
    ("config/best.py config/linear.py", ["config/best.py and config/linear.py both set the recipe"]),
    ("config/best.py config/web.py", ["config/web.py", "name the scale file before the recipe"]),
    ("--plugin=no_such.py", ["no_such.py", "no file of Python"]),
    ("--backbone=backbon", ["'backbon' is no recipe", "did you mean 'backbone'"])])
def test_words_that_cannot_be_meant_are_refused_with_the_way_out(words, says):
    if "backbon" in words:  # found out when it is looked for
        with pytest.raises(ConfigError) as error:
            go("train", words)
        line = line_of(error)
    else:
        line = refused(words)
    assert all(word in line for word in says), line


def test_a_recipes_own_name_and_a_new_one_may_be_given():
    assert configure_run(["config/best.py", "--recipe=best"])[0]["recipe"] == "best"
    assert configure_run(["config/best.py", "--recipe=mine"])[0]["recipe"] == "mine"


def test_a_home_folder_is_found_wherever_a_path_stands(tmp_path, monkeypatch, forget):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine.py").write_text("seed = 5\nbackbone = '~/there'\n")
    (tmp_path / "plugged.py").write_text("")
    words = ["--plugin=~/plugged.py", "~/mine.py", "--out_dir=~/out", "--mode=full"]
    config, _, _ = configure_run(words)
    assert config["seed"] == 5 and config["out_dir"] == f"{tmp_path}/out"
    assert config["plugin"][-1] == f"{tmp_path}/plugged.py" and config["backbone"] == f"{tmp_path}/there"
    assert configure(DEFAULTS, ["--backbone=hf:~/model"])[0]["backbone"] == f"hf:{tmp_path}/model"
    assert configure({"prompt": "x"}, ["--prompt=about ~/x"])[0]["prompt"] == "about ~/x"


# -----------------------------------------------------------------------------
# values: each kind of check in run.check_config

@pytest.mark.parametrize("words, says", [
    ("--gate=g4", ["--gate='g4' is unknown", "did you mean 'g", "--plugin=FILE"]),
    ("--estimator=sta", ["--estimator='sta' is unknown", "--plugin=FILE"]),
    ("--oracle=off_polcy", ["did you mean 'off_policy'", "--plugin=FILE"]),
    ("--mode=tpk", ["--mode='tpk' is unknown; did you mean 'topk'"]),
    ("--norm=batch", ["--norm='batch'", "rmsnorm"]),
    ("--device=gpu", ["--device='gpu'"]),
    ("--n_layer=0", ["--n_layer=0 is too small", "1 or more"]),
    ("--eval_interval=0", ["--eval_interval=0", "1 or more"]),
    ("--batch_size=-4", ["--batch_size=-4", "1 or more"]),
    ("--seed=-1", ["--seed=-1", "0 or more"]),
    ("--gate_lr=-0.1", ["--gate_lr=-0.1", "0 or more"]),
    ("--lambda_util=-1", ["--lambda_util=-1.0", "0 or more"]),
    ("--budget=1.5", ["--budget=1.5 is outside [0, 1]"]),
    ("--beta2=1.1", ["--beta2=1.1 is outside [0, 1]"]),
    ("--recipe=../../x", ["--recipe='../../x'", "plain name"]),
    ("--scale=", ["--scale=''", "plain name"]),
    ("--dataset=.x", ["--dataset='.x'", "plain name"]),
    ("--n_head=3", ["--n_embd=128 must be a multiple of --n_head=3"]),
    ("--n_kv_head=3", ["--n_kv_head=3"]),
    ("--controlled=[6]", ["--controlled=[6]", "0..5"]),
    ("--controlled=[2,1]", ["--controlled=[2, 1]", "ascending"]),
    ("--controlled=[1,1]", ["--controlled=[1, 1]"]),
    ("--controlled=[[1]]", ["--controlled=[[1]]"]),
    ("--n_layer=2 --controlled=[]", ["at least one layer of 0..1"]),
    ("--latent=129", ["--latent=129", "--n_embd=128"]),
    ("--lambda_lm=0", ["no loss trains the cheap FFNs", "--lambda_distill"]),
    ("config/static.py --layer_spread=0.5", ["whole layers", "leave --layer_spread out"]),
    ("config/full_adapter.py --cheap_start=fitted", ["two full FFNs", "leave it out"]),
    ("config/g1_no_utilrank.py --estimator=hard", ["--estimator='hard' without labels", "--lambda_util"]),
    ("--estimator=hard --label_share=0", ["--estimator='hard' without labels"])])
def test_a_value_that_cannot_run_is_refused_with_the_remedy(words, says):
    line = refused(words)
    assert all(word in line for word in says), line


def test_a_backbone_is_asked_for_nothing_that_only_controllers_need():
    configure_run(["config/backbone.py", "--latent=999", "--controlled=[77]"])


# -----------------------------------------------------------------------------
# help, and a real shell

@pytest.mark.parametrize("word", ["--help", "-h"])
@pytest.mark.parametrize("script", ["train", "sample", "prepare", "bench", "study"])
def test_help_prints_the_keys_with_their_meaning(script, word, monkeypatch, capsys):
    module = importlib.import_module(script)
    monkeypatch.setattr(sys, "argv", [f"{script}.py", "--no_such_key=1", word])
    with pytest.raises(SystemExit) as stop:
        module.main()
    out = capsys.readouterr().out
    assert stop.value.code == 0 and f"python {script}.py" in out
    missing = [key for key in module.DEFAULTS if f"{key}=" not in out]
    assert not missing and out.count("  # ") >= 3
    assert snapshot() == {}


def test_a_refusal_in_a_shell_is_one_line_and_exit_code_2():
    code, out, err = finish(start(HERE / "train.py", *tiny("--lerning_rate=1")))
    assert (code, out) == (2, "") and snapshot() == {}
    assert err.startswith("error: ") and err.count("\n") == 1 and "did you mean 'learning_rate'" in err


def test_what_is_no_refusal_is_an_ordinary_traceback(capsys):
    def broken():
        raise ValueError("of the program")
    with pytest.raises(ValueError):
        exit_on_error(broken)


def test_a_reader_that_goes_away_ends_the_program_quietly():
    code = "import sys, configurator\nconfigurator.exit_on_error(lambda: [print(i) for i in range(10 ** 6)])"
    process = start("-c", code)
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == "" and process.wait(60) == 141
    process.stderr.close()
