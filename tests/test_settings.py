"""Laws of `set`: any setting of any part by name, from Python, flags, files and words of `zolr compare`."""

import json

import pytest

from zolr.cli import main
from zolr.cli.variants import variant
from zolr.errors import UsageError
from zolr.estimators import setting
from zolr.methods import compose


def test_any_setting_of_any_part_can_be_named():
    assert compose("gum", set=["residual.q=0.25"]).residual.q == 0.25  # type: ignore[attr-defined]
    assert compose("vlorp", set=["projector.granularity=8"]).projector.granularity == 8  # type: ignore[attr-defined]
    assert compose("lisa", set=["blocks.count=1"]).layers.count == 1  # type: ignore[attr-defined]
    assert compose("galore", set=["projects=all"]).projects == "all"
    assert compose("stiefel", "fo", set=["dense=true"]).dense
    assert compose("fira", set=["residual.growth=null"]).residual.growth is None  # type: ignore[attr-defined]
    muon = compose("gum", set=["optimizer.momentum=0.8"]).optimizer
    assert muon.settings == {"nesterov": False, "momentum": 0.8}  # the row's own settings stay
    betas = compose("galore", set=["optimizer.betas=[0.8, 0.9]"]).optimizer.settings["betas"]
    assert betas == (0.8, 0.9)
    # a setting of a part inside another, and after the flags, which choose the parts
    assert setting(compose("lorenza", set=["estimator.eps=0.01"]).estimator, "eps") == 0.01
    chosen = compose("galore", residual="compensate", set=["residual.q=0.5"])
    assert chosen.residual.q == 0.5  # type: ignore[attr-defined]


REFUSED = {
    "residual.q": "names no setting; write PART.NAME=VALUE",
    "q=0.5": "names no setting",
    "residuals.q=0.5": "names no setting",
    "residual.=0.5": "names no setting",
    "residual.rate=0.5": "residual 'compensate' has no setting 'rate' .* it has q",
    "residual.q=half": "'half' cannot stand where 0.1 does",
    "residual.q=null": "None is not possible",
    "residual.q=1.5": "no probability",
    "projector.rank=true": "True cannot stand where 32 does",
    "projector.rank=0": "rank 0",
    "optimizer.lr=1": "has no setting 'lr'",
    "optimizer.momentum=x": "'x' is not possible",
    "transport.x=1": "transport 'reset' has no setting 'x' .* it has none",
    "scale=0.5": "names no setting",  # it has a flag
}


@pytest.mark.parametrize("word", REFUSED)
def test_what_names_no_setting_or_cannot_be_is_refused_with_what_can(word):
    with pytest.raises(UsageError, match=REFUSED[word]):
        compose("gum", set=[word])


def test_a_part_inside_another_is_no_value():
    with pytest.raises(UsageError, match="has no setting 'inner'"):
        compose("lorenza", set=["estimator.inner=1"])


@pytest.mark.parametrize("verb", ["finetune", "pretrain"])
def test_flags_files_and_what_is_printed_agree(tmp_path, capsys, verb):
    words = ["residual.q=0.25", "projects=all"]
    more = ["--data", str(tmp_path)] if verb == "pretrain" else []
    arguments = [verb, "--method", "gum", "--set", words[0], "--set", words[1], *more, "--print-config"]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert f"set = {json.dumps(words)}" in printed
    (tmp_path / "run.toml").write_text(printed)
    assert main([verb, "--config", str(tmp_path / "run.toml"), "--print-config"]) == 0
    assert capsys.readouterr().out == printed
    assert main([verb, "--method", "gum", "--set", "residual.p=1", *more, "--print-config"]) == 2


def test_a_word_of_compare_sets_them_too():
    word = "gum:fo@residual.q=0.25@lr=1e-3@set=projects=all@scale=0.5"
    name, settings = variant(word)
    assert name == word and settings["lr"] == 1e-3 and settings["scale"] == 0.5
    assert settings["set"] == ("residual.q=0.25", "projects=all")
