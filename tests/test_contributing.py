"""CONTRIBUTING.md: its first example is the code below, which adds a projector from outside of the package and uses it by name."""

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import zolr
from zolr.cli import main
from zolr.methods import METHODS
from zolr.projectors import PROJECTORS
from zolr.residuals import Plain, add_lifted
from zolr.residuals.drop import Drop

TEXT = (Path(__file__).parent.parent / "CONTRIBUTING.md").read_text()


# example
from zolr.projectors import Fixed, one_sided, orthonormal  # noqa: E402


@dataclass(frozen=True)
class Corner(Fixed):
    """The first columns of a random rotation of rows drawn with replacement."""

    rank: int = 8
    needs = "nothing"
    unbiased = False

    def draw(self, shape, key, *, like, **_):
        picked = key.uniform((shape[1], self.rank)).to(like) - 0.5
        return one_sided("right", shape, orthonormal(picked))  # (n, r)


zolr.PROJECTORS["corner"] = Corner
method = zolr.compose("stiefel", "fo", projector="corner", rank=2)
# end of the example


@pytest.fixture(autouse=True)
def registered() -> Any:
    PROJECTORS["corner"] = Corner
    yield
    PROJECTORS.pop("corner", None)  # other tests walk the registry


PROJECTORS.pop("corner")


def test_the_first_example_is_this_file_and_under_twenty_lines():
    source = Path(__file__).read_text()
    example = source.split("# example\n")[1].split("# end of the example")[0].replace("  # noqa: E402", "")
    shown = re.findall(r"```python\n(.*?)```", TEXT, re.S)[0]
    assert [line for line in example.splitlines() if line] == [
        line
        for line in shown.splitlines()
        if line and not line.startswith(("import zolr", "from dataclasses"))
    ]
    assert len([line for line in shown.splitlines() if line]) < 20


def test_it_trains_by_name():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = torch.nn.Linear(6, 3)
        x = torch.randn(32, 6)
    target = x[:, :3].clone()

    def loss(model: torch.nn.Module, batch: Tensor) -> Tensor:
        return F.mse_loss(model(batch), target)

    engine = zolr.Engine(model, method, lr=0.05, loss=loss, select="linear")
    losses = [engine.step([x]).loss for _ in range(30)]
    assert losses[-1] < 0.9 * losses[0]
    moved = engine.variables[0]
    assert moved.subspace.coords_shape == (3, 2)


def test_the_residual_of_the_page_moves_what_lies_outside_of_the_subspace():
    code = re.findall(r"```python\n(.*?)```", TEXT, re.S)[1]
    found: dict[str, Any] = {"dataclass": dataclass, "Plain": Plain, "add_lifted": add_lifted}
    exec(code, found)
    start = torch.randn(3, 6, generator=torch.Generator().manual_seed(0)).double()
    x = torch.randn(16, 6, generator=torch.Generator().manual_seed(1)).double()
    ranks = {}
    for name, residual in (("drop", Drop()), ("rest", found["Rest"]())):
        model = torch.nn.Linear(6, 3).double()
        model.weight.data.copy_(start)
        galore = replace(zolr.compose("galore", rank=1), residual=residual)
        engine = zolr.Engine(model, galore, lr=0.05, loss=lambda m, b: m(b).square().mean())
        engine.step([x])
        ranks[name] = int(torch.linalg.matrix_rank(engine.detach().weight.detach() - start, tol=1e-9))  # type: ignore[union-attr, arg-type]
    assert ranks == {"drop": 1, "rest": 3}


def test_what_the_page_names_exists():
    root = Path(__file__).parent.parent
    for path in re.findall(r"`((?:zolr|tests|benchmarks)/[\w/.]+\.(?:py|md|toml))`", TEXT):
        assert (root / path).exists(), path
    assert main(["methods", "galore"]) == 0 and "galore" in METHODS
