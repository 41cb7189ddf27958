"""Names, plugins in their three forms, and every way in which building a reward can fail."""

from __future__ import annotations

import math
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from configs.schema import RewardConfig
from rewards.__main__ import main
from rewards.protocol import RewardError
from rewards.runner import RewardSet
from rollout.catalog import Catalog
from rollout.types import RolloutGroup

MakeGroup = Callable[..., RolloutGroup]
ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "reward_plugin"

PLUGIN = '''
"""Rewards of the tests."""

def plain(group, catalog, *, bonus=1.0):
    """Pays the bonus to all."""
    return [bonus] * len(group)

def deep(group, catalog, k: int = 3):
    return [k] * len(group)

class Made:
    """A made one.

    And more.
    """

    def __init__(self, factor=2.0):
        if factor < 0:
            raise ValueError("factor is negative")
        self.factor = factor

    def __call__(self, group, catalog):
        return [self.factor] * len(group)

class NotCallable:
    pass

def one_argument(group):
    return [0.0] * len(group)

def needs(group, catalog, *, table):
    return [0.0] * len(group)

ready = Made(5.0)
number = 7
'''


@pytest.fixture
def plugin(tmp_path: Path) -> Path:
    path = tmp_path / "mine.py"
    path.write_text(PLUGIN)
    return path


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Installs an entry point `name = value`, as pip would."""

    def install(line: str, package: str = "pkg") -> None:
        info = tmp_path / f"{package}-1.2.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.2\n")
        (info / "entry_points.txt").write_text(f"[sidrl.rewards]\n{line}\n")
        monkeypatch.syspath_prepend(str(tmp_path))

    return install


def total(catalog: Catalog, group: RolloutGroup, *configs: RewardConfig) -> list[float]:
    return list(RewardSet(configs, catalog).score([group])[0].total)


def build_error(catalog: Catalog, *configs: RewardConfig) -> str:
    with pytest.raises(RewardError) as caught:
        RewardSet(configs, catalog)
    return str(caught.value)


# --- the three forms


def test_from_a_file(catalog: Catalog, make_group: MakeGroup, plugin: Path) -> None:
    group = make_group([0, None], targets=[0])
    assert total(catalog, group, RewardConfig(f"{plugin}:plain")) == [1, 1]
    assert total(catalog, group, RewardConfig(f"{plugin}:plain", params={"bonus": 0.5})) == [0.5, 0.5]
    assert total(catalog, group, RewardConfig(f"{plugin}:Made", params={"factor": 3})) == [3, 3]
    assert total(catalog, group, RewardConfig(f"{plugin}:ready", weight=0.5)) == [2.5, 2.5]


def test_from_a_relative_path(catalog: Catalog, make_group: MakeGroup, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    group = make_group([1, 3, None], targets=[1, 3], history=[0])  # sid 1 is of category a, as the history; 3 is b
    fresh = RewardConfig("examples/reward_plugin/fresh_first.py:fresh_first", params={"bonus": 0.25})
    assert total(catalog, group, fresh) == [1, 1.25, 0]
    template = RewardConfig("examples/reward_plugin/template.py:Template", name="template", params={"illegal": -1})
    result = RewardSet([template], catalog).score([group])[0]
    assert list(result.total) == [1, 0.5, -1]
    assert result.parts == {"template/place": (1.0, 2.0, 0.0)}


def test_from_a_module(
    catalog: Catalog, make_group: MakeGroup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "reward_pkg").mkdir()
    (tmp_path / "reward_pkg" / "inner.py").write_text(PLUGIN)
    monkeypatch.syspath_prepend(str(tmp_path))
    group = make_group([0], targets=[0])
    assert total(catalog, group, RewardConfig("reward_pkg.inner:Made")) == [2]
    assert "no module 'reward_pkg.outer'" in build_error(catalog, RewardConfig("reward_pkg.outer:Made"))


def test_from_an_entry_point(
    catalog: Catalog, make_group: MakeGroup, tmp_path: Path, installed: Callable[[str], None]
) -> None:
    (tmp_path / "entry_module_a.py").write_text(PLUGIN)
    installed("mine = entry_module_a:Made\nat_k = entry_module_a:deep\nbroken = entry_module_a:gone")
    group = make_group([0], targets=[0])
    assert total(catalog, group, RewardConfig("mine", params={"factor": 4})) == [4]
    assert total(catalog, group, RewardConfig("at_k")) == [3]
    assert total(catalog, group, RewardConfig("at_k@8")) == [8]
    assert build_error(catalog, RewardConfig("mine@8")) == "reward 'mine@8': mine has no k: write 'mine'"
    assert build_error(catalog, RewardConfig("broken")) == "reward 'broken': entry_module_a has no 'gone'"
    assert "did you mean 'mine'?" in build_error(catalog, RewardConfig("mines"))


def test_two_claims_to_one_name(catalog: Catalog, installed: Callable[..., None]) -> None:
    installed("ndcg = some.module:Thing\ntwice = some.module:One")
    installed("twice = other.module:Two", package="zzz")
    assert build_error(catalog, RewardConfig("ndcg@5")) == (
        "reward 'ndcg@5': 'ndcg' names the built-in 'ndcg' and the entry point some.module:Thing of pkg 1.2: "
        "rename the entry point, or take it as package.module:Name"
    )
    assert "other.module:Two of zzz 1.2 and the entry point some.module:One of pkg 1.2" in build_error(
        catalog, RewardConfig("twice")
    )
    RewardSet([RewardConfig("hit@5")], catalog)  # other names are unharmed


# --- names and weights


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        ("ndcg@0", "'0' after the @ must be a whole number of at least 1"),
        ("ndcg@x", "'x' after the @ must be a whole number of at least 1"),
        ("ndcg@", "'' after the @ must be a whole number of at least 1"),
        ("ndcg@-3", "'-3' after the @ must be a whole number of at least 1"),
        ("validity@3", "validity has no k: write 'validity'"),
        ("recal@5", "no such reward; did you mean 'recall'? (known: diversity, hit, mrr, ndcg,"),
        ("", "no such reward (known: "),
        (":Name", "':Name' must be package.module:Name or path/to/file.py:Name"),
        ("a.b:", "'a.b:' must be package.module:Name or path/to/file.py:Name"),
        ("no_such_package.x:Name", "no module 'no_such_package' (looked for 'no_such_package.x' on the Python path)"),
        ("/no/such/file.py:Name", "no file /no/such/file.py"),
        ("no/suffix:Name", "no file "),
    ],
)
def test_names_that_stand_for_nothing(catalog: Catalog, reward: str, message: str) -> None:
    assert build_error(catalog, RewardConfig(reward)).startswith(f"reward {reward!r}: {message}")


def test_two_of_a_kind_need_two_names(catalog: Catalog, make_group: MakeGroup) -> None:
    rewards = RewardSet([RewardConfig("ndcg@1"), RewardConfig("ndcg@10", weight=0.5)], catalog)
    assert rewards.names == ("ndcg@1", "ndcg@10")
    assert list(rewards.score([make_group([0], targets=[0])])[0].total) == [1.5]
    assert build_error(catalog, RewardConfig("mrr"), RewardConfig("mrr")) == (
        "two rewards are named 'mrr': set `name` of one of them"
    )
    RewardSet([RewardConfig("mrr"), RewardConfig("mrr", name="other")], catalog)


@pytest.mark.parametrize("weight", [math.nan, math.inf, "1"])
def test_weights_are_finite(catalog: Catalog, weight: float) -> None:
    message = f"reward 'mrr': weight={weight!r} must be a finite number"
    assert build_error(catalog, RewardConfig("mrr", weight=weight)) == message


def test_no_rewards(catalog: Catalog) -> None:
    assert build_error(catalog) == "rewards is empty: name at least one, such as ndcg@10"


# --- files that do not load, objects that do not fit


@pytest.mark.parametrize(
    ("name", "params", "message"),
    [
        ("Mad", {}, "has no 'Mad'; did you mean 'Made'?"),
        ("number", {}, "it is 7 of type int, which cannot be called"),
        ("NotCallable", {}, "class NotCallable lacks __call__(self, group, catalog): its objects cannot be called"),
        ("plain", {"bonsu": 1}, "unexpected keyword argument 'bonsu'; it is called as (group, catalog, params) and "
         "takes (group, catalog, *, bonus=1.0); did you mean 'bonus'?"),
        ("plain", {"group": 1}, "multiple values for argument 'group'"),
        ("needs", {}, "missing a required argument: 'table'; it is called as (group, catalog) and takes "),
        ("one_argument", {}, "too many positional arguments; it is called as (group, catalog) and takes (group)"),
        ("Made", {"factr": 1}, "unexpected keyword argument 'factr'; it takes (factor=2.0); did you mean 'factor'?"),
        ("Made", {"factor": -1}, 'constructing it failed: ValueError: factor is negative ('),
        ("Made", {"factor": -1}, 'line 19: raise ValueError("factor is negative"))'),
    ],
)  # fmt: skip
def test_objects_that_do_not_fit(
    catalog: Catalog, plugin: Path, name: str, params: dict[str, object], message: str
) -> None:
    said = build_error(catalog, RewardConfig(f"{plugin}:{name}", params=params))
    assert said.startswith(f"reward '{plugin}:{name}': ")
    assert message in said


def test_k_is_set_once(catalog: Catalog) -> None:
    message = "reward 'ndcg@5': k is set twice, in the name and in params"
    assert build_error(catalog, RewardConfig("ndcg@5", params={"k": 3})) == message


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("x = 1\ndef f(:\n", "importing {path} failed: SyntaxError: invalid syntax ({path}, line 2: def f(:)"),
        ("x = 1\nx / 0\n", "importing {path} failed: ZeroDivisionError: division by zero ({path}, line 2: x / 0)"),
        ("import gone_x\n", "importing {path} failed: ModuleNotFoundError: No module named 'gone_x' "
         "({path}, line 1: import gone_x)"),
        ("import json\njson.loads('x')\n", "(char 0) ({path}, line 2: json.loads('x'))"),
    ],
)  # fmt: skip
def test_files_that_do_not_import(catalog: Catalog, tmp_path: Path, source: str, message: str) -> None:
    path = tmp_path / "bad.py"
    path.write_text(source)
    said = build_error(catalog, RewardConfig(f"{path}:f"))
    assert message.format(path=path) in said
    path.write_text(PLUGIN)  # mended, it loads: a failed import leaves nothing behind
    RewardSet([RewardConfig(f"{path}:Made")], catalog)


def test_modules_that_do_not_import(catalog: Catalog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "module_bad_a.py").write_text("import gone_y\n")
    (tmp_path / "module_bad_b.py").write_text("raise RuntimeError('no table')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    a, b = (build_error(catalog, RewardConfig(f"module_bad_{letter}:f")) for letter in "ab")
    assert "importing module_bad_a failed: ModuleNotFoundError: No module named 'gone_y'" in a
    assert "line 1: import gone_y)" in a
    assert "importing module_bad_b failed: RuntimeError: no table" in b


# --- the command, the example, the imports


def test_listing(installed: Callable[[str], None], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "entry_module_b.py").write_text(PLUGIN)
    installed("mine = entry_module_b:Made\nplain = entry_module_b:plain\nbroken = entry_module_b:gone")
    assert main([]) == 0
    table = " ".join(capsys.readouterr().out.split())
    for expected in ("ndcg@k", "validity", "rank_penalty", "mine", "A made one.", "bonus=1.0", "'gone'", "pkg 1.2"):
        assert expected in table
    assert main(["mine"]) == 0
    assert capsys.readouterr().out == "mine: Made(factor=2.0)\n\nA made one.\n\nAnd more.\n"
    assert main(["ndcg@10"]) == 0
    assert capsys.readouterr().out.startswith("ndcg@10: Ndcg(k=None, credit='gain', illegal=0.0) with k=10\n\nThe ")
    assert main(["ndgc"]) == 2
    assert "did you mean 'ndcg'" in capsys.readouterr().err
    assert main(["--nonsense"]) == 2


def test_example_package_names_what_it_holds() -> None:
    points = re.findall(r'^(\w+) = "(\w+):(\w+)"$', (EXAMPLE / "pyproject.toml").read_text(), re.MULTILINE)
    assert points
    for _, module, name in points:
        assert re.search(rf"^(def|class) {name}\b", (EXAMPLE / f"{module}.py").read_text(), re.MULTILINE)


def test_rewards_load_no_heavy_package() -> None:
    modules = sorted(f"rewards.{path.stem}" for path in (ROOT / "rewards").glob("*.py"))
    code = (
        f"import sys, importlib\nfor m in {modules}: importlib.import_module(m)\n"
        "print([m for m in ('torch', 'vllm', 'ray', 'trl', 'transformers') if m in sys.modules])"
    )
    assert subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True) == "[]\n"
