"""M1 holds of every row: each has a loop written from its paper, and settings at which it is another row."""

import ast
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import test_methods
import test_streamed_rows
from test_methods import BATCHES, ROWS, WINDOW, distance, each, little, trained

from zolr.estimators import changed
from zolr.layers.cycle import Cycle
from zolr.layers.sampled import Sampled
from zolr.methods import METHODS, Method, compose
from zolr.optim import OptimizerRule
from zolr.projectors.stiefel import Stiefel
from zolr.projectors.svd import LazySvd
from zolr.residuals.compensate import Compensate

FEW = BATCHES[:8]
PARTS = ("estimator", "projector", "transport", "residual", "layers")
# an adapter has a model of its own, so that its loops and reductions are in a file of its own
ADAPTERS = {("lora", "fo"), ("lora", "zo")}


def is_of(method: Method, name: str) -> bool:
    """Whether a method is that row, whatever the settings of its parts are."""
    row = METHODS[name].methods.get(method.paradigm)
    same = row is not None and all(type(getattr(row, p)) is type(getattr(method, p)) for p in PARTS)
    return same and row.optimizer.name == method.optimizer.name and row.dense == method.dense


def defined_in(path: str) -> set[str]:
    """Names of the tests in a file beside this one."""
    tree = ast.parse((Path(__file__).parent / path).read_text())
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_every_row_has_a_loop_written_from_its_paper():
    cases: dict[str, tuple[Any, ...]] = {**test_methods.EQUAL, **test_streamed_rows.EQUAL}
    assert len(cases) == len(test_methods.EQUAL) + len(test_streamed_rows.EQUAL)
    covered = {
        (case.split(",")[0], entry[0].paradigm)
        for case, entry in cases.items()
        if case.split(",")[0] in METHODS and is_of(entry[0], case.split(",")[0])
    }
    assert set(ROWS) - ADAPTERS == covered, set(ROWS) - ADAPTERS - covered
    assert "test_m1_lora_equals_the_loop_written_from_its_paper" in defined_in("test_lora.py")


# ---- settings at which a row is another one --------------------------------------------------------------------------------

WHOLE = {"rank": 12, "refresh_every": 3}  # no side of a weight is longer
SMALL = {"rank": 3, "refresh_every": WINDOW}
PLAIN_SGD = compose("sgd")
STILL = OptimizerRule("momentum", {"momentum": 0.0, "dampening": 0.0})
SPSA = {"eps": 1e-3, "rank": 3, "refresh_every": WINDOW}
EVERY = len(FEW) + 1  # a window that outlasts the run


def unscaled(name: str, **settings: Any) -> Method:
    """A row with plain descent and no factor on what is lifted."""
    method = compose(name, optimizer="sgd", **settings)
    return replace(method, scale=1.0)


def as_sgd(replaced: str) -> Method:
    """`phi = 1` where the step is the gradient."""
    method = unscaled(replaced, **({} if replaced == "apollo-mini" else {"rank": 2}))
    return replace(method, residual=replace(method.residual, growth=None))  # type: ignore[type-var]


def alone(method: Method) -> Method:
    """With random signs in sequence, one-sided and not normalized."""
    return replace(method, estimator=changed(method.estimator, normalize=False, signs="sequence", probes=1))


ONE = {"select": lambda name, _: name.startswith("up.")}
REDUCES: dict[tuple[str, str], tuple[Method, Method, dict[str, Any], float] | tuple[str, str]] = {
    ("stiefel", "fo"): (unscaled("stiefel", paradigm="fo", **WHOLE), PLAIN_SGD, {}, 1e-10),
    ("stiefel", "zo"): (
        compose("stiefel", "zo", projector="identity", law="gaussian", eps=1e-3),
        compose("mezo"),
        {},
        0.0,
    ),
    # the limit of differences; the probes have the same names
    ("stiefel", "fwd"): (compose("stiefel", "fwd", **SMALL), compose("zo-adam", eps=1e-5, **SMALL), {}, 1e-6),
    ("dependent", "fo"): (unscaled("dependent", paradigm="fo", **WHOLE), PLAIN_SGD, {}, 1e-10),
    # as many orthogonal probes as a matrix has entries show its gradient
    ("dependent", "zo"): (
        compose("dependent", "zo", eps=1e-3, rank=8, refresh_every=3, probes=64, directions="orthonormal"),
        PLAIN_SGD,
        {"select": lambda name, _: name == "query.weight"},
        1e-5,
    ),
    ("mezo", "zo"): (
        compose("mezo", law="rademacher"),
        alone(compose("fzoo", eps=1e-3, sides=2)),
        {},
        0.0,
    ),
    ("lozo", "zo"): (
        compose("lozo", refresh_every=WINDOW),
        compose(
            "stiefel", "zo", projector="gaussian", law="gaussian", eps=1e-3, rank=2, refresh_every=WINDOW
        ),
        {},
        0.0,
    ),
    ("lozo-m", "zo"): (
        replace(compose("lozo-m", refresh_every=WINDOW), optimizer=STILL),
        compose("lozo", refresh_every=WINDOW),
        {},
        0.0,
    ),
    # its constant so large that nothing is divided by anything else
    ("zo-adam", "zo"): (
        compose("zo-adam", **SPSA, set=["optimizer.betas=[0.0,0.9]", "optimizer.eps=1e9"]),
        compose("stiefel", "zo", **SPSA),
        {"lr": 1e7},
        1e-6,
    ),
    ("zo-momentum", "zo"): (
        replace(compose("zo-momentum", **SPSA), optimizer=STILL),
        compose("stiefel", "zo", **SPSA),
        {},
        0.0,
    ),
    ("zo-muon", "zo"): (
        "test_methods.py",
        "test_m1_zo_muon_with_all_probes_of_the_whole_space_is_muon",
    ),
    ("fzoo", "zo"): (
        alone(compose("fzoo", eps=1e-3, sides=2)),
        compose("mezo", law="rademacher"),
        {},
        0.0,
    ),
    ("dpzero", "zo"): (
        compose("dpzero", limit=float("inf"), noise=0.0),
        compose("mezo"),
        {"loss": each},
        1e-9,
    ),
    ("zo-hgd", "zo"): (
        replace(
            compose("zo-hgd", probes=2, **SPSA),
            estimator=replace(compose("zo-hgd", probes=2, **SPSA).estimator, share=1.0),
        ),  # type: ignore[type-var]
        compose("stiefel", "zo", probes=2, **SPSA),
        {},
        0.0,
    ),
    ("subzero", "zo"): (
        compose("subzero", rank=3, refresh_every=WINDOW),
        compose("stiefel", "zo", projector="two_sided", law="gaussian", eps=1e-3, **SMALL),
        {},
        0.0,
    ),
    ("rso", "fo"): (
        compose("rso", **SMALL),
        compose("stiefel", "fo", projector="gaussian", **SMALL),
        {},
        0.0,
    ),
    ("galore", "fo"): (unscaled("galore", **WHOLE), PLAIN_SGD, {}, 1e-10),
    ("fira", "fo"): (unscaled("fira", **WHOLE), PLAIN_SGD, {}, 1e-10),
    ("apollo", "fo"): (as_sgd("apollo"), PLAIN_SGD, {}, 1e-7),  # 1e-8 stands in a denominator
    ("apollo-mini", "fo"): (as_sgd("apollo-mini"), PLAIN_SGD, {}, 1e-7),
    ("ldadam", "fo"): (unscaled("ldadam", rank=12), PLAIN_SGD, {}, 1e-10),
    **{
        (name, "fo"): (
            compose(name, rank=3, refresh_every=EVERY),
            compose("fira", rank=3, refresh_every=EVERY),
            {},
            0.0,
        )
        for name in ("subtrack", "grasswalk", "grassjump")
    },
    ("grasswalk", "zo"): (
        compose("grasswalk", "zo", eps=1e-3, rank=3, refresh_every=EVERY),
        compose("stiefel", "zo", eps=1e-3, rank=3, refresh_every=EVERY),
        {},
        0.0,
    ),
    ("q-galore", "fo"): (
        replace(compose("q-galore", **SMALL), projector=LazySvd(rank=3, threshold=1.0)),
        compose("galore", **SMALL),
        {},
        0.0,
    ),
    ("flora", "fo"): (
        "test_streamed_rows.py",
        "test_m1_flora_in_a_space_as_large_as_the_weight_is_adafactor_with_momentum",
    ),
    ("plumage", "fo"): (unscaled("plumage", **WHOLE), PLAIN_SGD, {}, 1e-10),
    ("gum", "fo"): (
        replace(compose("gum", **SMALL), residual=Compensate(q=0.0)),
        replace(
            compose("galore", optimizer="muon", transport="reset", **SMALL),
            scale=1.0,
            optimizer=METHODS["gum"].build().optimizer,
        ),
        {},
        0.0,
    ),
    ("mofasgd", "fo"): (
        "test_streamed_rows.py",
        "test_m1_mofasgd_at_full_rank_is_the_polar_factor_of_plain_momentum",
    ),
    ("vlorp", "fo"): (
        replace(
            unscaled("vlorp", refresh_every=3, residual="drop"),
            projector=replace(METHODS["vlorp"].build().projector, rank=12, granularity=4, around=Stiefel()),  # type: ignore[type-var]
        ),
        PLAIN_SGD,
        {},
        1e-10,
    ),
    ("lomo", "fo"): (compose("lomo"), PLAIN_SGD, {}, 1e-12),
    ("adalomo", "fo"): (compose("adalomo"), replace(compose("adalomo"), dense=False), {}, 1e-12),
    ("adazo-sam", "fo"): (compose("adazo-sam", reach=0.0), compose("adamw"), {}, 0.0),
    ("lorenza", "fo"): (unscaled("lorenza", reach=0.0, **WHOLE), PLAIN_SGD, {}, 1e-10),
    ("extrapolation", "fo"): (compose("extrapolation", reach=0.0), PLAIN_SGD, {}, 0.0),
    ("badam", "fo"): (replace(compose("badam"), layers=Cycle(every=EVERY)), compose("adamw"), ONE, 0.0),
    ("lisa", "fo"): (replace(compose("lisa"), layers=Sampled(count=7, every=3)), compose("adamw"), {}, 0.0),
    ("sgd", "fo"): (
        compose("adamw", optimizer="momentum", set=["optimizer.momentum=0.0", "optimizer.dampening=0.0"]),
        PLAIN_SGD,
        {},
        0.0,
    ),
    ("adamw", "fo"): (
        replace(
            compose("galore", refresh_every=3),
            projector=Stiefel(rank=12, side="short"),
            projects="embedding",
            scale=1.0,
        ),
        compose("adamw"),
        {"select": lambda name, _: "embed" not in name},
        1e-12,
    ),
    ("muon", "fo"): (
        compose("muon"),
        replace(compose("muon"), dense=True),
        {},
        1e-12,
    ),
}


def test_every_row_has_settings_at_which_it_is_another():
    assert set(REDUCES) == set(ROWS) - ADAPTERS
    for entry in REDUCES.values():
        if len(entry) == 2:
            assert entry[1] in defined_in(entry[0])
    assert "test_m1_lora_with_a_fixed_orthogonal_matrix_is_sgd" in defined_in("test_lora.py")


COMPARED = [name for name, entry in REDUCES.items() if len(entry) == 4]


@pytest.mark.parametrize("row", COMPARED, ids=":".join)
def test_m1_a_row_at_these_settings_is_another_row(row):
    method, other, settings, atol = REDUCES[row]  # type: ignore[misc]
    if method == other:
        return  # the same composition by another name
    theirs = {name: value for name, value in settings.items() if name not in ("loss", "lr")}
    reduced = trained(method, batches=FEW, **settings)
    assert distance(reduced, trained(other, batches=FEW, **theirs)) <= atol
    start = [{name: p.detach() for name, p in little().named_parameters()}]
    assert distance(reduced, start) > 1e-4
