"""Method: one choice of estimator, projector, optimizer and transport; METHODS: the literature as rows."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, is_dataclass, replace
from difflib import get_close_matches
from math import sqrt
from typing import Any, Literal

import torch

from zolr.errors import UsageError, check_numbers, is_count, plain
from zolr.estimators import ESTIMATORS, PARADIGMS, POINTS, Estimator, changed, setting
from zolr.estimators.ascent import Ascent
from zolr.estimators.backprop import Backprop
from zolr.estimators.coordinates import Coordinates
from zolr.estimators.forward import Forward
from zolr.estimators.likelihood_ratio import LikelihoodRatio
from zolr.estimators.lookahead import Lookahead
from zolr.estimators.mixture import Mixture
from zolr.estimators.private_spsa import PrivateSpsa, epsilon_of
from zolr.estimators.spsa import Spsa
from zolr.layers import LAYERS, Layers
from zolr.layers.all import All
from zolr.layers.cycle import Cycle
from zolr.layers.sampled import Sampled
from zolr.optim import OptimizerRule
from zolr.projectors import PROJECTORS, Projector
from zolr.projectors.dependent import Dependent
from zolr.projectors.gaussian import Gaussian
from zolr.projectors.identity import Identity
from zolr.projectors.jump import Jump
from zolr.projectors.plumage import Plumage
from zolr.projectors.power_iteration import PowerIteration
from zolr.projectors.range_finder import RangeFinder
from zolr.projectors.stiefel import Stiefel
from zolr.projectors.svd import LazySvd, Svd
from zolr.projectors.tracking import Tracking
from zolr.projectors.two_sided import TwoSidedHaar
from zolr.projectors.viewed import View
from zolr.projectors.walk import Walk
from zolr.residuals import RESIDUALS, Residual
from zolr.residuals.compensate import Compensate
from zolr.residuals.drop import Drop
from zolr.residuals.error_feedback import ErrorFeedback
from zolr.residuals.precondition import Precondition
from zolr.residuals.projfactor import ProjFactor
from zolr.residuals.recover import Recover
from zolr.residuals.replace import Replace
from zolr.transports import TRANSPORTS, Transport
from zolr.transports.align import Align
from zolr.transports.aware import Aware
from zolr.transports.keep import Keep
from zolr.transports.reproject import Reproject
from zolr.transports.reset import Reset


@dataclass(frozen=True)
class Method:
    """How the gradient is estimated, in which subspace, with which optimizer, and what happens between windows.

    Args:
        estimator: a gradient estimator.
        projector: how subspaces of matrices are drawn; vectors (biases, norms) always have their whole space.
        optimizer: the rule that turns gradients of coordinates into steps.
        transport: what becomes of optimizer state when a subspace changes.
        refresh_every: life of a subspace in optimizer steps; None keeps the first one.
        dense: dense gradients are streamed at every step, one alive at a time; each is projected, and the step of its
            coordinates is lifted onto the weight at once.
        scale: factor on the steps of matrices that `projects` and `tables` project: on what a dense method lifts (GaLore's
            alpha), elsewhere on their learning rate. All else is trained at the rate itself. Decay does not know of it.
        projects: matrices that have a subspace: "all", or categories joined by "+" (see `kinds.selection`); others
            have their whole space, as vectors do.
        tables: embeddings and heads: "full" (in their whole space), "subspace" (projected as other matrices are) or "frozen"
            (not trained); None leaves them to `projects` and to what is selected for training.
        residual: what a dense method does with the part of a gradient that the subspace does not hold.
        layers: which blocks of the model are active at a time.
        accumulate: where a dense method sums the gradients of micro-batches: "dense" (a sum as large as the weights; exact),
            or "coordinates" (each is projected as it comes; a new subspace is taken from the first one of its step, so that
            all of a step are in one subspace). Weights without a subspace have a dense sum in any case.
        clipping: how a dense method, which has one gradient at a time, clips by their norm together: "last" (by the norm of
            the step before, at no cost; the first step as "twice") or "twice" (by their own norm, from a backward pass
            more). Other methods have all gradients at once and clip exactly.
        ranks: `(part of a weight's name, rank)`: weights whose subspaces have another rank than the projector says. The
            first part that a name contains counts.
        adapter: what an adapter has put into the model is trained; an engine says so of a model without one.

    Raises:
        UsageError: parts that cannot work together.
    """

    estimator: Estimator
    projector: Projector
    optimizer: OptimizerRule
    transport: Transport = field(default_factory=Reset)
    refresh_every: int | None = None
    dense: bool = False
    scale: float = 1.0
    projects: str = "all"
    residual: Residual = field(default_factory=Drop)
    layers: Layers = field(default_factory=All)
    accumulate: Literal["dense", "coordinates"] = "dense"
    clipping: Literal["last", "twice"] = "last"
    tables: Literal["full", "subspace", "frozen"] | None = None
    ranks: tuple[tuple[str, int], ...] = ()
    adapter: bool = False

    def __post_init__(self) -> None:
        every = self.refresh_every
        if every is not None and not is_count(every):
            raise UsageError(
                f"refresh_every = {every!r} is no number of steps; use at least 1, or none to never refresh"
            )
        if not (self.estimator.exact or callable(getattr(self.estimator, "measure", None))):
            raise UsageError(
                f"estimator '{type(self.estimator).__name__}' is not exact and has no `measure`; derive it from "
                "zolr.estimators.BySlopes and give it that"
            )
        if self.projector.needs == "gradient" and self.paradigm != "fo":
            raise UsageError(
                f"projector '{key_of(PROJECTORS, self.projector)}' needs a gradient, but paradigm '{self.paradigm}' "
                "gives none; use 'stiefel', or --paradigm fo"
            )
        if self.projector.needs == "gradient" and not self.dense:
            raise UsageError(
                f"projector '{key_of(PROJECTORS, self.projector)}' needs dense gradients, which this method never forms; "
                "use method 'galore', or projector 'stiefel'"
            )
        check_numbers(scale=self.scale)
        if not 0 < self.scale < float("inf"):
            raise UsageError(f"scale = {self.scale} is no factor on a learning rate; use a positive number")
        if self.dense and self.paradigm != "fo":
            raise UsageError(f"paradigm '{self.paradigm}' gives no dense gradient; use --paradigm fo")
        for _, rank in self.ranks:
            _with(self.projector, f"projector '{key_of(PROJECTORS, self.projector)}'", rank=rank)  # checks it
        self._check_residual()
        self._check_streams()
        if self.private and self.projector.learns_from == "inputs":
            raise UsageError(
                f"projector '{key_of(PROJECTORS, self.projector)}' learns from inputs without noise, so estimator "
                "'private_spsa' would not be private with it; use projector 'stiefel'"
            )
        if isinstance(self.estimator, Mixture) and isinstance(self.estimator.random, PrivateSpsa):
            raise UsageError(
                "a mixture looks at losses without noise, so estimator 'private_spsa' would not be private in it; "
                "use estimator 'spsa'"
            )
        if self.transport.needs_change and self.optimizer.degrees is None:
            raise UsageError(
                f"transport '{key_of(TRANSPORTS, self.transport)}' does not know the state of optimizer "
                f"'{self.optimizer.name}'; use transport 'reset' or 'keep'"
            )

    def _check_streams(self) -> None:
        if self.tables not in (None, "full", "subspace", "frozen"):
            raise UsageError(f"tables '{self.tables}' is not known; use 'full', 'subspace' or 'frozen'")
        if self.tables == "subspace" and isinstance(self.projector, Identity):
            raise UsageError(
                "tables 'subspace' needs a projector, and 'identity' has the whole space; use tables 'full' or 'frozen', or "
                "projector 'stiefel'"
            )
        if self.accumulate not in ("dense", "coordinates"):
            raise UsageError(
                f"accumulate '{self.accumulate}' is not known; use 'dense', or 'coordinates' for a dense method"
            )
        if self.clipping not in ("last", "twice"):
            raise UsageError(f"clipping '{self.clipping}' is not known; use 'last' or 'twice'")
        if self.accumulate == "coordinates" and (not self.dense or isinstance(self.projector, Identity)):
            raise UsageError(
                "accumulate 'coordinates' is for methods that project dense gradients; this one has no larger sums than "
                "its coordinates, use 'dense'"
            )
        if self.accumulate == "coordinates" and self.residual.dense:
            raise UsageError(
                f"residual '{key_of(RESIDUALS, self.residual)}' needs the dense gradient of a step, which accumulation in "
                "the coordinates never sums; use accumulate 'dense', or residual 'drop'"
            )

    def _check_residual(self) -> None:
        why = None
        if self.residual.dense and self.paradigm != "fo":
            why = f"needs dense gradients, which paradigm '{self.paradigm}' does not give; use residual 'drop', or --paradigm fo"
        elif self.residual.dense and not self.dense:
            why = (
                "needs dense gradients, which this method never forms; "
                "use residual 'drop', or a dense method such as 'galore'"
            )
        elif self.residual.dense and isinstance(self.projector, Identity):
            why = (
                "is about what a subspace does not hold, and projector 'identity' holds all; "
                "use residual 'drop', or a method with subspaces such as 'galore'"
            )
        elif self.residual.reads_moments and self.optimizer.degrees is None:
            why = (
                f"does not know the state of optimizer '{self.optimizer.name}'; "
                "use residual 'drop', or optimizer 'adamw'"
            )
        if why is not None:
            raise UsageError(f"residual '{key_of(RESIDUALS, self.residual)}' {why}")

    @property
    def paradigm(self) -> str:
        """ "fo" (backprop), "zo" (forward only) or "fwd" (forward mode)."""
        return self.estimator.paradigm

    def projector_of(self, name: str) -> Projector:
        """The projector of the weight of this name, with the rank that `ranks` has for it."""
        rank = next((rank for part, rank in self.ranks if part in name), None)
        return self.projector if rank is None else changed(self.projector, rank=rank)

    @property
    def private(self) -> bool:
        """Whether all that is learned from the data goes through noise."""
        return isinstance(self.estimator, PrivateSpsa)

    @property
    def tunable(self) -> bool:
        """Whether an engine may choose the learning rate from losses that it measures."""
        elsewhere = isinstance(
            self.estimator, tuple(POINTS.values())
        )  # what is measured is not where a step is taken
        return self.paradigm == "zo" and not self.private and not elsewhere and self.measurable

    @property
    def measurable(self) -> bool:
        """Whether steps are by what an engine measures radii and rates with: slopes between two points."""
        return not isinstance(self.estimator, LikelihoodRatio)

    @property
    def has_radius(self) -> bool:
        """Whether its estimator looks at points some way off."""
        return setting(self.estimator, "eps", _ABSENT) is not _ABSENT

    @property
    def radius(self) -> float | None:
        """How far off; None where that is to be chosen."""
        return setting(self.estimator, "eps")

    @property
    def normalizes(self) -> bool:
        """Whether a step's size does not depend on that of the gradient."""
        own = setting(self.estimator, "normalize", False)
        return own or self.optimizer.normalizes or self.residual.normalizes


@dataclass(frozen=True)
class Adapter:
    """Small matrices that a package of its own puts beside the weights, and that are trained in their place.

    Args:
        kind: what the package calls it (see `zolr.lora`).
        rank: of the small matrices, at least 1.

    Raises:
        UsageError: a rank out of range.
    """

    kind: str = "lora"
    rank: int = 8

    def __post_init__(self) -> None:
        if not is_count(self.rank):
            raise UsageError(
                f"rank {self.rank!r} of an adapter is not possible; use a whole number of at least 1"
            )


@dataclass(frozen=True)
class Row:
    """One method of the literature.

    Args:
        name: its name on the command line.
        summary: one line.
        methods: a method per paradigm; the first is the default.
        train: which weights it trains per paradigm unless the user says otherwise (see `kinds.selection`); all of
            them where nothing is said.
        lr: learning rate of fine-tuning per paradigm when the user gives none, under fo for a model of width 768; None
            lets the engine choose from what it measures.
        equation: the step.
        reference: where it was published.
        follows: paper or released code, and where they differ.
        limits: what it cannot be combined with, and other warnings.
        adapter: what the model is wrapped in before training, and trained instead of its own weights; None for
            nothing. An engine trains the model that it is given: who builds one wraps the model (see `zolr.lora`).
    """

    name: str
    summary: str
    methods: Mapping[str, Method]
    equation: str
    reference: str
    follows: str
    limits: str = ""
    train: Mapping[str, str] = field(default_factory=dict)
    lr: Mapping[str, float | None] = field(default_factory=dict)
    adapter: Adapter | None = None

    @property
    def paradigms(self) -> tuple[str, ...]:
        """Paradigms it runs under, the default one first."""
        return tuple(self.methods)

    def build(self, paradigm: str | None = None) -> Method:
        """The method under a paradigm.

        Raises:
            UsageError: the row does not run under it.
        """
        paradigm = paradigm or self.paradigms[0]
        if paradigm not in PARADIGMS:
            raise UsageError(f"paradigm '{paradigm}' is not known; use one of {', '.join(PARADIGMS)}")
        if paradigm not in self.methods:
            others = [row.name for row in METHODS.values() if paradigm in row.methods][:4]
            raise UsageError(
                f"method '{self.name}' runs under {', '.join(self.paradigms)}, not under '{paradigm}'; use another paradigm, or a "
                f"method that does: {', '.join(others)} (zolr methods lists them all)"
            )
        return self.methods[paradigm]

    def trained(self, paradigm: str) -> str:
        """Which weights it trains under a paradigm."""
        return self.train.get(paradigm, "all")


SGD, ADAMW = OptimizerRule("sgd"), OptimizerRule("adamw")
ZO_ADAMW = OptimizerRule("adamw", {"betas": (0.9, 0.99)})

_ROWS = (
    Row(
        "stiefel",
        "the gradient in a Haar-random subspace, the optimal law when nothing is known of it (default of `zolr finetune`)",
        {
            "zo": Method(Spsa(), Stiefel(rank=16), SGD, Reset(), 200),
            "fo": Method(Backprop(), Stiefel(rank=32), ADAMW, Reset(), 100),
            "fwd": Method(Forward(), Stiefel(rank=16), ZO_ADAMW, Reset(), 200),
        },
        "W + B Pᵀ, P = sqrt(n/r) Q, Q Haar on the Stiefel manifold; train B, fold every refresh_every steps",
        "arXiv 2603.20632",
        "paper (law and scale); rank, window and optimizer are our defaults",
        "a left basis (--side left) saves all inputs of a layer for backward; dense gradients are never formed: a residual other than "
        "'drop' streams them, under fo alone",
        train={"zo": "attention", "fwd": "attention"},
        lr={"zo": None, "fo": 2.5e-4, "fwd": 1e-3},
    ),
    Row(
        "dependent",
        "directions sampled by the spectrum of the gradient's second moment, the instance-dependent optimum",
        {
            "fo": Method(Backprop(), Dependent(rank=16), ADAMW, Reset(), 100),
            "zo": Method(Spsa(), Dependent(rank=16, alpha=0.2, source="inputs"), SGD, Reset(), 200),
        },
        "P = [sqrt(1/pi_i) q_i], pi_i = min(1, sqrt(sigma_i)/lambda), sum pi = r, E[GᵀG] = Q diag(sigma) Qᵀ",
        "arXiv 2603.20632",
        "paper (law); the spectrum estimate from projected gradients or probes is ours",
        "Adam rescales coordinates, so only SGD sees an unbiased estimate",
        train={"zo": "attention"},
        lr={"zo": None, "fo": 2.5e-4},
    ),
    Row(
        "mezo",
        "forward-only SGD in the whole space",
        {"zo": Method(Spsa(eps=1e-3, law="gaussian"), Identity(), SGD)},
        "W <- W - lr c Z, c = (L(W + eps Z) - L(W - eps Z)) / (2 eps), Z Gaussian",
        "arXiv 2305.17333",
        "paper; weights are not walked in place unless asked (realization 'inplace')",
        "no subspace: no rank, window, transport or residual; its variance grows with the number of trained weights, so its rate is small",
        lr={"zo": 1e-6},
    ),
    Row(
        "lozo",
        "forward-only SGD along low-rank Gaussian directions",
        {"zo": Method(Spsa(eps=1e-3, law="gaussian"), Gaussian(rank=2), SGD, Reset(), 50)},
        "W <- W - lr c U Vᵀ / sqrt(r), c the slope along U Vᵀ / sqrt(r), V kept for refresh_every steps",
        "arXiv 2410.07698",
        "paper; the released code has no 1/r and applies a wrong direction on every refresh step",
        "eps is that of the normalized direction: the paper's eps times sqrt(r)",
        lr={"zo": 1e-6},
    ),
    Row(
        "lozo-m",
        "lozo with momentum in the coordinates, carried over a refresh",
        {
            "zo": Method(
                Spsa(eps=1e-3, law="gaussian"), Gaussian(rank=2), OptimizerRule("momentum"), Align(), 50
            )
        },
        "N <- b N + (1 - b) c U, W <- W - lr N Vᵀ / sqrt(r); at a refresh N <- N (V_oldᵀ V_old)⁻¹ V_oldᵀ V_new",
        "arXiv 2410.07698",
        "paper; its factor 1/n at a refresh is replaced by the exact inverse Gram matrix; the buffer starts at the "
        "first gradient, as torch's SGD does",
        "eps as in lozo; what a new V does not share with the old one is forgotten at a refresh, all but about r/n of the momentum",
        lr={"zo": 1e-6},
    ),
    Row(
        "zo-adam",
        "Adam on the coordinates of a random subspace, from forward passes alone",
        {"zo": Method(Spsa(), Stiefel(rank=16), ZO_ADAMW, Reset(), 200)},
        "M <- b1 M + (1 - b1) c Z, V <- b2 V + (1 - b2) (c Z)², B <- B - lr M' / (sqrt(V') + 1e-8), bias-corrected; "
        "W + B Pᵀ, P as in stiefel",
        "arXiv 2305.17333 (MeZO-Adam); arXiv 1910.06513 (ZO-AdaMM)",
        "paper, in a subspace, where the moments are as small as the coordinates; projector 'identity' is MeZO-Adam; "
        "b2 = 0.99, so that the moments fill within a window, and the window are our choices",
        "with one Rademacher probe a step's V is the same number c² in every coordinate",
        train={"zo": "attention"},
        lr={"zo": None},
    ),
    Row(
        "zo-momentum",
        "momentum on the coordinates of a random subspace, from forward passes alone",
        {"zo": Method(Spsa(), Stiefel(rank=16), OptimizerRule("momentum"), Reset(), 200)},
        "N <- b N + (1 - b) c Z, B <- B - lr N; W + B Pᵀ, P as in stiefel",
        "arXiv 2305.17333 (MeZO-momentum)",
        "paper, in a subspace; projector 'identity' is MeZO-momentum; the buffer starts at the first gradient, as torch's "
        "SGD does, and again with every subspace (lozo-m carries it over)",
        "a window of few steps is mostly the first gradient of each; transport 'align' carries the buffer over",
        train={"zo": "attention"},
        lr={"zo": None},
    ),
    Row(
        "zo-muon",
        "several probes in one subspace, whose mean is orthogonalized",
        {
            "zo": Method(
                Spsa(probes=4, law="gaussian", sides=1),
                Stiefel(rank=32, side="left"),
                OptimizerRule("muon", {"momentum": 0.0, "nesterov": False}),
                Reset(),
                100,
            )
        },
        "G = (1/k) sum_i (L(W + eps P U_i) - L(W)) / eps U_i, W <- W - lr 0.2 sqrt(max(r, n)) P msign(G), "
        "P (m, r) = sqrt(m/r) Q with Q Haar, msign by 5 Newton-Schulz iterations",
        "arXiv 2602.17155",
        "the paper's rule as its code has it (Haar Q on the output side, one-sided Gaussian probes, no momentum); "
        "inferred: 4 probes, window 100 (its script's defaults). Ours: rank 32 (theirs 64), P is scaled to be unbiased (the paper's has columns of "
        "length 1, so its eps is ours times sqrt(m/r)) and the step to AdamW's size. The released code lifts all probes but "
        "the last through another Q on refresh steps, and moves vectors by a fixed rate of 1e-7; here AdamW moves vectors, "
        "embeddings and heads",
        "rounded to bfloat16 in msign, as torch's Muon is; with one probe msign sees the probe alone: all that is left of the "
        "slope is its sign",
        train={"zo": "attention"},
        lr={"zo": None},
    ),
    Row(
        "fzoo",
        "several one-sided probes in one forward, their step divided by the spread of their losses",
        {"zo": Method(Spsa(probes=8, sides=1, signs="together", normalize=True), Identity(), SGD)},
        "W <- W - lr sum_i (L_i - L_0) U_i / (k std(L_1 ... L_k)), L_i = L(W + eps U_i), U_i of fair signs",
        "arXiv 2506.09034",
        "released code in sequence (its rule with the standard deviation over k; what it calls batched cannot run); all probes "
        "in one forward by vmap are ours, as is no step where all probes agree",
        "k copies of the directions are alive; signs 'sequence' holds one. A one-sided loss carries its curvature, so the "
        "mean slope is not zero where the gradient is",
        train={"zo": "attention"},
        lr={"zo": None},
    ),
    Row(
        "dpzero",
        "differentially private: slopes of single examples, clipped, averaged, and one number of noise a step",
        {"zo": Method(PrivateSpsa(), Identity(), SGD)},
        "W <- W - lr (1/n) (sum_j clip(c_j, -C, C) + N(0, (sigma C)²)) Z, c_j the slope of example j's loss along Z",
        "arXiv 2310.09639",
        "paper's rule with a noise multiplier sigma (C = limit, sigma = noise) and Gaussian Z, as released; the paper's "
        "analysis has law 'sphere'. Its optimizer in the release draws the noise again for every tensor. Accounting: "
        "replacing one example by one of the same label moves the sum by 2 C at most; all steps together are one Gaussian "
        "mechanism with mu = 2 sqrt(uses) / sigma, uses = ceil(steps n / rows), doubled where n does not divide the rows: "
        "delta(epsilon) = Phi(mu/2 - epsilon/mu) - e^epsilon Phi(-mu/2 - epsilon/mu). "
        f"sigma = 10: epsilon = {epsilon_of(2 * sqrt(10) / 10, 1e-5):.2f} for 10 uses and "
        f"{epsilon_of(2 * sqrt(100) / 10, 1e-5):.2f} for 100, at delta = 1e-5; a run prints its own",
        "needs one loss an example; no amplification by sampling is claimed; private are the weights, against who does not "
        "know the seed: not printed losses, label counts or --group-by-length; no measured eps or rate, which would look at "
        "losses without noise. In pretraining an example is a row of tokens, and no epsilon is told: a text can reach over rows",
        lr={"zo": 1e-6},
    ),
    Row(
        "zo-hgd",
        "random directions, mixed with slopes along rows that are sampled by what those have found",
        {
            "zo": Method(
                Mixture(Spsa(probes=2), Coordinates(blocks=2), share=0.5), Stiefel(rank=16), SGD, Reset(), 200
            )
        },
        "G = w (1/k) sum_i c_i Z_i + (1 - w) sum_(b in I) c_b z_b / p_b, "
        "p_b = min(1, sqrt(d_b) |G_b| / lambda) with sum p_b = |I|, mixed with the uniform law",
        "arXiv 2012.11518",
        "inferred from the abstract: weights, probabilities by water-filling on the random estimate; a coordinate is a row of "
        "d_b coordinates along which one random direction is measured (for d_b = 1 the partial derivative itself), since "
        "single weights of a language model are too many",
        "2 (k + |I|) forwards a step; the row sampled is moved 1 / p_b times as far",
        train={"zo": "attention"},
        lr={"zo": None},
    ),
    Row(
        "subzero",
        "forward-only SGD between two orthonormal bases",
        {"zo": Method(Spsa(eps=1e-3, law="gaussian"), TwoSidedHaar(rank=24), SGD, Reset(), 1000)},
        "W <- W - lr c s U Z Vᵀ, s = sqrt(m n) / r, U and V orthonormal, kept for refresh_every steps",
        "arXiv 2410.08989",
        "released code (norm alignment s)",
        "two bases a weight: no side to choose, and r² coordinates where one side has r m; what lies outside of either is not met in a window",
        lr={"zo": 1e-6},
    ),
    Row(
        "rso",
        "Adam on random Gaussian subspaces, each trained for a while from zero",
        {"fo": Method(Backprop(), Gaussian(rank=16), ADAMW, Reset(), 100)},
        "W + B Pᵀ, P entries N(0, 1/r); a few Adam steps on B, then fold and draw again",
        "arXiv 2502.07222",
        "paper's practice (Gaussian); its proximal term is the restart of B at zero",
        "columns of P are not orthogonal: its second moment is (n + r + 1)/r that of the gradient, stiefel's n/r; moments begin afresh in every window",
        lr={"fo": 2.5e-4},
    ),
    Row(
        "galore",
        "Adam on dense gradients seen through their leading singular directions",
        {
            "fo": Method(
                Backprop(), Svd(rank=32), ADAMW, Keep(), 200, dense=True, scale=0.25, projects="linear"
            )
        },
        "W <- W - lr a P N(Pᵀ G), P the r leading singular vectors of G on its shorter side, taken every refresh_every steps, "
        "N Adam; moments kept as they are when P changes",
        "arXiv 2403.03507",
        "released code (side, scale a = 0.25, kept moments; embeddings, head and vectors by plain AdamW at the unscaled rate); "
        "moments are float32 whatever the weights are",
        "dense gradients: one alive at a time, but sums of all while micro-batches accumulate (--accumulate-in coordinates has "
        "none); clipping by the norm of the step before (--clip-by twice: exact, by a second backward pass)",
        lr={"fo": 5e-4},
    ),
    Row(
        "fira",
        "galore, and beside it the rest of the gradient at the rate that Adam shows in the subspace",
        {
            "fo": Method(
                Backprop(),
                Svd(rank=32),
                ADAMW,
                Keep(),
                200,
                dense=True,
                scale=0.25,
                projects="linear",
                residual=Recover(),
            )
        },
        "W <- W - lr (a P N + L), L = phi (G - P Pᵀ G), phi_j = |N_j| / |(Pᵀ G)_j|, |L| at most 1.01 times its last norm; "
        "P, a and N as in galore",
        "arXiv 2410.01623",
        "paper; the released code subtracts a P Pᵀ G and limits norms without Adam's bias corrections: "
        "Recover(released=True)",
        "dense gradients as galore's; a small gradient holds the added part down for long: it may grow by 1 % a step",
        lr={"fo": 5e-4},
    ),
    Row(
        "apollo",
        "SGD whose rate per channel is Adam's, as seen in a random subspace",
        {
            "fo": Method(
                Backprop(),
                Gaussian(rank=32, side="short"),
                ADAMW,
                Keep(),
                200,
                dense=True,
                projects="linear",
                residual=Replace(),
            )
        },
        "W <- W - lr sqrt(a) phi G, phi_j = |N_j| / |(Pᵀ G)_j|, P entries N(0, 1/r) on the shorter side, N Adam; the norm of "
        "the step at most 1.01 times the last one",
        "arXiv 2412.05270",
        "paper; every weight and window has its own P (the released per-layer mode gives equal shapes one); the released "
        "code limits norms without Adam's bias corrections: Replace(released=True)",
        "dense gradients as galore's; no momentum in the direction of a step",
        lr={"fo": 5e-4},
    ),
    Row(
        "apollo-mini",
        "apollo with one rate per matrix, from a subspace of rank 1",
        {
            "fo": Method(
                Backprop(),
                Gaussian(rank=1, side="short"),
                ADAMW,
                Keep(),
                200,
                dense=True,
                scale=128**0.5,
                projects="linear",
                residual=Replace(level="tensor"),
            )
        },
        "W <- W - lr sqrt(128) phi G, phi = |N| / |Pᵀ G|, P (n, 1) entries N(0, 1); the rest as in apollo",
        "arXiv 2412.05270",
        "paper; released code as in apollo",
        "dense gradients as galore's; no momentum in the direction of a step",
        lr={"fo": 5e-4},
    ),
    Row(
        "ldadam",
        "Adam in a subspace that follows momentum and gradient at every step, and feedback of what it misses",
        {
            "fo": Method(
                Backprop(),
                PowerIteration(rank=32),
                OptimizerRule("adamw", {"betas": (0.908, 0.99)}),
                Aware(),
                1,
                dense=True,
                projects="linear",
                residual=ErrorFeedback(),
            )
        },
        "A = G + E; P' = QR(B Bᵀ P), B = rho P m + (1 - rho) A; W <- W - lr P' N(P'ᵀ A), N Adam with projection-aware moments "
        "(transport 'aware'); E = A - P' P'ᵀ A + b1/(1 - b1) (P M - P' M')",
        "arXiv 2410.16103",
        "paper; a square matrix is projected on its input side, the released code takes the output side",
        "dense gradients as galore's, and a buffer as large as the weight",
        lr={"fo": 5e-4},
    ),
    Row(
        "subtrack",
        "fira in a subspace that is turned toward what it misses of the gradient",
        {
            "fo": Method(
                Backprop(),
                Tracking(rank=32, step=10.0),
                ADAMW,
                Aware(),
                200,
                dense=True,
                scale=0.25,
                projects="linear",
                residual=Recover(),
            )
        },
        "P' = P + (P v (cos t - 1) + u sin t) vᵀ, t = 10 s, s u vᵀ the leading part of 2 (G - P Pᵀ G) (Pᵀ G)ᵀ, every "
        "refresh_every steps; projection-aware moments; step and recovery as in fira",
        "arXiv 2502.01586",
        "paper; in the released code tall and square matrices never move, moments are turned one step early and always "
        "against the first basis, and second moments shrink by 1 - b2: none of it reproduced",
        "dense gradients as galore's; the angle has the units of a squared gradient (Tracking(step=None) fits it instead)",
        lr={"fo": 5e-4},
    ),
    Row(
        "grasswalk",
        "fira in a subspace on a random walk, with moments that follow it",
        {
            "fo": Method(
                Backprop(),
                Walk(rank=32),
                ADAMW,
                Aware(),
                200,
                dense=True,
                scale=0.25,
                projects="linear",
                residual=Recover(),
            ),
            "zo": Method(Spsa(), Walk(rank=16, side="right", c=1.0), SGD, Reset(), 200),
        },
        "P' = P + (P V (cos t - 1) + U sin t) Vᵀ, t = angle S / S_1, (I - P Pᵀ) X = U S Vᵀ, X Gaussian, every refresh_every "
        "steps, from the SVD of the first gradient (zo: from a Haar draw); projection-aware moments; step and recovery as "
        "in fira",
        "arXiv 2510.01878",
        "abstract and reviews, as no algorithm box or code could be had: the walk, transport and recovery are SubTrack++'s "
        "with a random tangent; the angle of 0.5 is ours",
        "under fo dense gradients as galore's; under zo nothing is recovered, as there is no gradient",
        train={"zo": "attention"},
        lr={"fo": 5e-4, "zo": None},
    ),
    Row(
        "grassjump",
        "fira in an independent random subspace at every refresh",
        {
            "fo": Method(
                Backprop(),
                Jump(rank=32),
                ADAMW,
                Aware(),
                200,
                dense=True,
                scale=0.25,
                projects="linear",
                residual=Recover(),
            )
        },
        "P' = QR(X), X Gaussian, every refresh_every steps, after the SVD of the first gradient; projection-aware moments; "
        "step and recovery as in fira",
        "arXiv 2510.01878",
        "abstract and reviews, as no algorithm box or code could be had: transport and recovery are SubTrack++'s",
        "dense gradients as galore's; a jump leaves r/n of the moments while new gradients come at full size: steps are too "
        "long until the second moment has filled again (transport 'reset' or 'align' avoid it)",
        lr={"fo": 5e-4},
    ),
    Row(
        "q-galore",
        "galore with bases of 4 bits that are taken anew the more rarely the less they move",
        {
            "fo": Method(
                Backprop(),
                LazySvd(rank=32, bits=4),
                ADAMW,
                Keep(),
                200,
                dense=True,
                scale=0.25,
                projects="linear",
            )
        },
        "galore, P in codes of 4 bits (groups of 256, a scale and a zero point each); the gap between two draws of a weight "
        "doubles when the leading directions of its last 5 draws have a mean cosine of at least 0.4",
        "arXiv 2407.08296",
        "released code (threshold, queue of 5, doubling, leading direction, groups of 256), but the cosine's absolute value, "
        "since the sign of a singular vector means nothing, between the bases as kept; two codes a byte (there one)",
        "such bases are no projection any more: --set projector.bits=8, or null. States are float32 unless --optimizer "
        "adamw8bit. Its weights of 8 bits are left out: a coded weight is never written here (what moves it lies beside it), "
        "while this rule writes every weight at every step, and would have to code whole rows anew with random rounding; "
        "weights have the dtype of the model. Dense gradients as in galore",
        lr={"fo": 5e-4},
    ),
    Row(
        "flora",
        "Adafactor whose momentum lives in a random subspace",
        {
            "fo": Method(
                Backprop(),
                Gaussian(rank=32, side="short"),
                OptimizerRule("flora"),
                Reproject(),
                200,
                dense=True,
                projects="linear",
                residual=Precondition(),
            )
        },
        "U = G / sqrt(V), V Adafactor's; M <- b M + (1 - b) U P; W <- W - lr s clip((1 - b) U + b M_old Pᵀ), s = max(1e-3, "
        "rms(W)); at a refresh M <- M P_oldᵀ P_new",
        "arXiv 2402.03293",
        "released code (Adafactor before the momentum, this step's update uncompressed, clipping, scale by the weight), but a "
        "refresh comes before a step, not between the two uses of the momentum in one; bases are kept, not drawn again",
        "dense gradients as in galore; compressed accumulation is a part of its own",
        lr={"fo": 1e-3},
    ),
    Row(
        "plumage",
        "Adam on singular directions of the gradient that are sampled, not cut off",
        {"fo": Method(Backprop(), Plumage(rank=32), ADAMW, Align(), 200, dense=True, projects="linear")},
        "P = [v_i / sqrt(p_i)], i in J of size r, p_i = min(1, s_i / lambda), sum p = r; W <- W - lr N(G P) Pᵀ; moments "
        "realigned when P changes",
        "arXiv 2505.18313",
        "abstract and reviews (law, water-filling, fixed-size sampling); inferred: first moments as in LOZO-M; ours: the "
        "average of second moments, and the split of the weight 1/p into a root on each side; a fixed window",
        "unbiased for SGD and momentum, and there for the gradient of the refresh; Adam and Muon lose the inner root "
        "(see the projector); the paper's adaptive window, whose rule could not be had, is left out (projector lazy_svd has "
        "one); dense gradients as in galore",
        lr={"fo": 1e-3},
    ),
    Row(
        "gum",
        "Muon in the leading directions of the gradient, or, by a coin per weight and window, in all that they leave out",
        {
            "fo": Method(
                Backprop(),
                Svd(rank=32),
                OptimizerRule("muon", {"nesterov": False}),
                Reset(),
                200,
                dense=True,
                projects="linear",
                residual=Compensate(q=0.1),
            )
        },
        "with probability q: M <- b M + (G - P Pᵀ G) / q, W <- W - lr NS(M); else M <- b M + Pᵀ G / (1 - q), "
        "W <- W - lr P NS(M); the coin is tossed, P taken and M emptied every refresh_every steps",
        "arXiv 2510.17802",
        "reviews and a derived sheet (no code was released); inferred: momentum restarts with the window, a coin per weight "
        "and not a fixed number of layers; rate as in row muon (torch's match_rms_adamw)",
        "in a share q of the windows momentum is as large as the weight; what is unbiased is the gradient that momentum is "
        "fed, not the step; q by --set residual.q; dense gradients as in galore",
        lr={"fo": 7.5e-4},
    ),
    Row(
        "mofasgd",
        "momentum kept as its leading singular triples, which turn with every gradient",
        {"fo": Method(Backprop(), Identity(), OptimizerRule("mofasgd", {"rank": 16}), dense=True)},
        "U diag(s) Vᵀ <- SVD_r(b U diag(s) Vᵀ + U Uᵀ G + G V Vᵀ - U Uᵀ G V Vᵀ), W <- W - lr U Vᵀ",
        "arXiv 2507.08091",
        "paper's step and start (the released code divides by s and starts from the weights: setting released of the "
        "optimizer); rate multiplied by 0.2 sqrt(max(m, n)) as in row muon; embeddings, head and vectors by AdamW",
        "rank is that of the optimizer; what lies outside of its spans is left out, as in every published run: --set "
        "optimizer.outside=1 descends it (the paper's eta_2); dense gradients, one alive at a time; clipping as in "
        "galore",
        lr={"fo": 1.5e-3},
    ),
    Row(
        "vlorp",
        "many thin random projections of parts of each row, divided by a factored second moment of what is lifted",
        {
            "fo": Method(
                Backprop(),
                View(rank=2, granularity=16),
                OptimizerRule("averaged", {"correct": True}),
                Keep(),
                30,
                dense=True,
                projects="linear",
                residual=ProjFactor(),
            )
        },
        "G as (m c, n / c), R = G P, P entries N(0, 1/r); M <- b M + (1 - b) R; V factored from (R Pᵀ)²; "
        "W <- W - lr (M Pᵀ) / (sqrt(V) + eps)",
        "arXiv 2505.01744",
        "released code (bias corrections, eps, M kept as it is when P changes; its factor a cancels), but one P a window, not "
        "one a micro-batch, and always the input side; its best c = 256, r = 1 is for widths of 4096, c r = 32 here is the "
        "budget of row galore",
        "dense gradients as in galore, and two lifts a step; for widths that 16 does not divide, parts are fewer; c by --set "
        "projector.granularity",
        lr={"fo": 7.5e-4},
    ),
    Row(
        "lomo",
        "SGD inside the backward pass, one gradient alive",
        {"fo": Method(Backprop(), Identity(), SGD, dense=True)},
        "W <- W - lr G, as soon as G is complete",
        "arXiv 2306.09782",
        "paper; no loss scaling (there is no float16 gradient to save)",
        "clipping is by the norm of the step before (--clip-by twice: exact, by a second backward pass, as released)",
        lr={"fo": 1e-2},
    ),
    Row(
        "adalomo",
        "Adafactor without a first moment inside the backward pass, one gradient alive",
        {"fo": Method(Backprop(), Identity(), OptimizerRule("adalomo"), dense=True)},
        "V <- (1 - t^-0.8) V + t^-0.8 G² (rows and columns); U = G / sqrt(V), U <- U / max(1, rms(U)); "
        "W <- W - lr max(1e-3, rms(W)) U",
        "arXiv 2310.10195",
        "released code (constants), whose weights of any dtype are moved in float32 as here",
        "weights that start at zero move by lr / 1000 a step; clipping as in lomo",
        lr={"fo": 1e-3},
    ),
    Row(
        "adazo-sam",
        "sharpness-aware AdamW: forward passes find the way uphill, one backward pass from there is descended",
        {"fo": Method(Ascent(Backprop(), Spsa(eps=1e-3)), Identity(), ADAMW)},
        "A = (1/q) sum_j [(L(W + eps Z_j) - L(W - eps Z_j)) / (2 eps)] Z_j, Z_j random signs; AdamW on G(W + rho A / |A|)",
        "arXiv 2502.19571",
        "derived sheets of the paper, which differ in the sign of A: ours goes uphill, as SAM does; |A| over all weights, rho = "
        "0.05 (SAM's), q = 1, eps = 1e-3 and signs in place of Gaussian entries are our choices",
        "2 q forwards beside the backward; the moved weights are a second copy of them until backward has passed",
        lr={"fo": 5e-5},
    ),
    Row(
        "lorenza",
        "adazo-sam inside the range of a gradient: probes, descent and moments in a low-rank subspace",
        {
            "fo": Method(
                Ascent(Backprop(), Spsa(eps=1e-3), within=True),
                RangeFinder(rank=32),
                ADAMW,
                Keep(),
                200,
                dense=True,
                scale=0.25,
                projects="linear",
            )
        },
        "Q = orth(G Omega) every refresh_every steps; A = (1/q) sum_j c_j Q Z_j, c_j the slope along Q Z_j; R = Qᵀ G(W + rho A / |A|); "
        "W <- W - lr a Q N(R), N Adam",
        "arXiv 2502.19571",
        "derived sheets of the paper, which disagree on the shape of the probes: ours are random signs in all coordinates of the "
        "subspace; scale, kept moments, side and embeddings as galore has them; a new Q is taken from the gradient at the moved point",
        "weights without a subspace are not moved uphill, and none is before the first subspace; dense gradients as in galore",
        lr={"fo": 5e-4},
    ),
    Row(
        "extrapolation",
        "extragradient: the gradient at a look-ahead point, applied at the weights",
        {"fo": Method(Lookahead(Backprop()), Identity(), SGD)},
        "W <- W - lr G(W - reach G(W)), both on the same batches; along 'noise': W <- W - lr G(W + reach Z), Z standard normal",
        "arXiv 2006.05720",
        "the abstract; equations inferred from extragradient (Korpelevich 1976), reach = lr at first",
        "two backward passes a step (one along 'noise', --set estimator.along=noise). Along the gradient of the step before it "
        "takes one, and a copy of that gradient: --method sgd --optimizer optimistic, whose weights are the look-ahead points",
        lr={"fo": 1e-2},
    ),
    Row(
        "badam",
        "Adam on one block of layers at a time, all in turn",
        {"fo": Method(Backprop(), Identity(), ADAMW, layers=Cycle(every=50))},
        "K = 50 steps of AdamW from a fresh state on one block, all else fixed; then the next block, in a random order each round",
        "arXiv 2404.02827",
        "released code (order, K, state discarded at a switch; embeddings, head and last norm left out); the schedule runs on over "
        "switches",
        "below float32 every trained weight keeps a float32 master, not only those of the block; --outside blocks gives "
        "embeddings and head turns of their own",
        lr={"fo": 5e-5},
    ),
    Row(
        "lisa",
        "AdamW on embeddings, head and a few random blocks, drawn anew every so often",
        {"fo": Method(Backprop(), Identity(), ADAMW, layers=Sampled(count=2, every=20))},
        "every K = 20 steps gamma = 2 blocks are drawn; AdamW on these, embeddings and head; all else fixed",
        "arXiv 2403.17919",
        "released code (uniform draw, embeddings and head always, optimizer state kept)",
        "kept state grows to that of AdamW as blocks are met; below float32 every trained weight keeps a float32 master",
        lr={"fo": 5e-5},
    ),
    Row(
        "sgd",
        "plain SGD by backprop",
        {"fo": Method(Backprop(), Identity(), SGD)},
        "W <- W - lr G",
        "torch.optim.SGD",
        "torch",
        "the rate goes with the size of gradients, which is another one for every model",
        lr={"fo": 1e-2},
    ),
    Row(
        "adamw",
        "full AdamW by backprop, the baseline of every table",
        {"fo": Method(Backprop(), Identity(), ADAMW)},
        "torch.optim.AdamW on the weights",
        "arXiv 1711.05101",
        "torch",
        "two float32 moments as large as the weights; no subspace, so no rank, window, transport or residual",
        lr={"fo": 5e-5},
    ),
    Row(
        "muon",
        "Muon on matrices and AdamW on vectors, by backprop",
        {"fo": Method(Backprop(), Identity(), OptimizerRule("muon"))},
        "W <- W - lr s NewtonSchulz(momentum of G)",
        "Jordan et al. 2024",
        "torch.optim.Muon, learning rate scaled to match AdamW's step size",
        "embeddings, head and vectors by AdamW; rounded to bfloat16 where it is orthogonalized; momentum as large as the matrices",
        lr={"fo": 2.5e-4},
    ),
    Row(
        "lora",
        "AdamW on low-rank matrices beside every linear map but the head, the weights themselves fixed (PEFT's)",
        {
            "fo": Method(Backprop(), Identity(), ADAMW, adapter=True),
            "zo": Method(Spsa(), Identity(), ZO_ADAMW, adapter=True),
        },
        "W + (alpha/r) B A, A (r, n) random, B (m, r) zero at the start; train A and B",
        "arXiv 2106.09685",
        "released code: PEFT's own layers, initialization and defaults (alpha 8, no dropout)",
        "needs the package peft; rank is that of the adapter; in Python wrap the model yourself (zolr.lora.wrap), and "
        "select zolr.lora.trained",
        train={"fo": "adapter", "zo": "adapter"},
        lr={"fo": 1e-3, "zo": None},
        adapter=Adapter("lora", rank=8),
    ),
)
METHODS: dict[str, Row] = {row.name: row for row in _ROWS}


def key_of(registry: Mapping[str, Any], part: Any) -> str:
    """The name under which a part's class is registered."""
    return next((name for name, cls in registry.items() if type(part) is cls), type(part).__name__)


def nearest(kind: str, name: str, known: Sequence[str]) -> UsageError:
    """The error for an unknown name, with the nearest known one."""
    close = get_close_matches(name, known, n=1, cutoff=0.4)
    hint = f"did you mean '{close[0]}'? " if close else ""
    return UsageError(f"{kind} '{name}' is not known; {hint}known: {', '.join(known)}")


def _lookup(kind: str, registry: Mapping[str, Any], name: str) -> Any:
    if is_dataclass(name):
        raise UsageError(
            f"{kind} = {name!r} is no name; use one of {', '.join(registry)}, or put your own part in by dataclasses.replace(method, {kind}=...)"
        )
    if name not in registry:
        raise nearest(kind, str(name), list(registry))
    return registry[name]


def _shared(part: Any, cls: type) -> dict[str, Any]:
    """Settings of `part` that class `cls` has too, so that changing the law keeps rank, side, eps, ..."""
    names = {f.name for f in fields(cls)}
    given = {f.name: getattr(part, f.name) for f in fields(part) if f.name in names}
    return {name: value for name, value in given.items() if value is not None}


def compose(
    method: str | None = None,
    paradigm: str | None = None,
    *,
    projector: str | None = None,
    rank: int | None = None,
    side: str | None = None,
    refresh_every: int | None = None,
    optimizer: str | None = None,
    transport: str | None = None,
    estimator: str | None = None,
    probes: int | None = None,
    eps: float | None = None,
    law: str | None = None,
    sides: int | None = None,
    directions: str | None = None,
    signs: str | None = None,
    limit: float | None = None,
    noise: float | None = None,
    residual: str | None = None,
    point: str | None = None,
    reach: float | None = None,
    blocks: str | None = None,
    switch_every: int | None = None,
    outside: str | None = None,
    accumulate_in: str | None = None,
    clip_by: str | None = None,
    tables: str | None = None,
    scale: float | None = None,
    set: Sequence[str] = (),
    ranks: str | Mapping[str, int] | None = None,
) -> Method:
    """A row of METHODS with some of its parts or settings replaced.

    Args:
        method: name of a row; "stiefel" when not given.
        paradigm: "fo", "zo" or "fwd"; the row's default when not given.
        set: any setting of any part as "PART.NAME=VALUE" ("residual.q=0.2", "optimizer.betas=[0.9, 0.95]"), parts being
            estimator, projector, optimizer, transport, residual and blocks; or "projects=all", "dense=true".
        ranks: ranks of single weights by parts of their names, as a mapping or as `q_proj=16,mlp=64`.

    Raises:
        UsageError: an unknown name (with the nearest known one), or a setting that the part does not have.
    """
    if isinstance(method, Row | Method):
        way = (
            f"zolr.compose('{method.name}')"
            if isinstance(method, Row)
            else "dataclasses.replace(method, ...)"
        )
        raise UsageError(f"compose takes the name of a row, and this is a {type(method).__name__}; use {way}")
    row: Row = _lookup("method", METHODS, "stiefel" if method is None else method)
    if paradigm is not None:
        _lookup("paradigm", PARADIGMS, paradigm)
    result = row.build(paradigm)
    if row.adapter is not None:
        if projector not in (None, "identity"):
            raise UsageError(
                f"method '{row.name}' trains its adapter in the whole space, not by projector '{projector}'; "
                "leave the projector out, or use method 'stiefel'"
            )
        if rank is not None:
            replace(row.adapter, rank=rank)  # checks it; the method is the same for every rank of the adapter
        rank = None
    if projector is not None:
        cls = _lookup("projector", PROJECTORS, projector)
        if type(result.projector) is not cls:
            result = replace(result, projector=cls(**_shared(result.projector, cls)))
        if cls is Identity:
            result = replace(result, refresh_every=None, transport=Keep())
        elif result.refresh_every is None:
            result = replace(result, refresh_every=100)
    if estimator is not None:
        cls = _lookup("estimator", ESTIMATORS, estimator)
        if paradigm is not None and cls.paradigm != paradigm:
            raise UsageError(
                f"estimator '{estimator}' belongs to paradigm '{cls.paradigm}', not to '{paradigm}'; name one of the two"
            )
        if type(result.estimator) is not cls:
            shared = _shared(result.estimator, cls)
            if any(f.default is MISSING and f.name not in shared for f in fields(cls)):
                raise UsageError(
                    f"estimator '{estimator}' is made of others, which a name does not tell; use method 'zo-hgd'"
                )
            result = replace(result, estimator=cls(**shared))
    if optimizer is not None and optimizer != result.optimizer.name:
        result = replace(result, optimizer=OptimizerRule(optimizer))
    if rank is not None and result.optimizer.owns_rank and isinstance(result.projector, Identity):
        settings = {**result.optimizer.settings, "rank": rank}
        result, rank = replace(result, optimizer=replace(result.optimizer, settings=settings)), None
    if point is not None:
        result = replace(result, estimator=_at_point(result.estimator, _lookup("point", POINTS, point)))
    result = replace(
        result,
        projector=_with(
            result.projector,
            f"projector '{key_of(PROJECTORS, result.projector)}'",
            rank=rank,
            side=side,
        ),
        estimator=_with(
            result.estimator,
            f"paradigm '{result.paradigm}'",
            probes=probes,
            eps=eps,
            law=law,
            sides=sides,
            directions=directions,
            signs=signs,
            limit=limit,
            noise=noise,
            reach=reach,
        ),
    )
    if residual is not None:
        part = _lookup("residual", RESIDUALS, residual)()
        # what needs dense gradients gets them where the paradigm has any; the method refuses it elsewhere
        result = replace(
            result, residual=part, dense=result.dense or (part.dense and result.paradigm == "fo")
        )
    if tables is not None:
        if row.adapter is not None and tables != "frozen":
            raise UsageError(
                f"method '{row.name}' trains its adapter and no embedding or head, so tables '{tables}' cannot be; leave it out"
            )
        result = replace(result, tables=tables)  # pyright: ignore[reportArgumentType]
    if ranks is not None:
        result = replace(result, ranks=_ranks(ranks))
    if accumulate_in is not None:
        result = replace(result, accumulate=accumulate_in)  # pyright: ignore[reportArgumentType]
    if scale is not None:
        result = replace(result, scale=scale)
    if clip_by is not None:
        if not result.dense:
            raise UsageError(
                f"clip_by '{clip_by}' is for dense methods; this one has all gradients at once and clips by their norm, "
                "leave it out"
            )
        result = replace(result, clipping=clip_by)  # pyright: ignore[reportArgumentType]
    if blocks is not None:
        cls = _lookup("blocks", LAYERS, blocks)
        if type(result.layers) is not cls:
            result = replace(result, layers=cls())
    owner = f"blocks '{key_of(LAYERS, result.layers)}'"
    result = replace(result, layers=_with(result.layers, owner, every=switch_every, outside=outside))
    if transport is not None:
        result = replace(result, transport=_lookup("transport", TRANSPORTS, transport)())
    if refresh_every is not None:
        if isinstance(result.projector, Identity):
            raise UsageError("refresh_every means nothing for projector 'identity'; leave it out")
        result = replace(result, refresh_every=plain(refresh_every))
    if isinstance(set, str) or not (isinstance(set, Sequence) and all(isinstance(word, str) for word in set)):
        raise UsageError(f"set = {set!r} is no list of settings; give one, such as ['residual.q=0.2']")
    for word in set:
        result = _set(result, word)
    return result


# parts by the names that flags have for them, and what of a method is no part and has no flag
_PARTS = {
    **{p: p for p in ("estimator", "projector", "optimizer", "transport", "residual")},
    "blocks": "layers",
}
_REGISTRIES: dict[str, Mapping[str, Any]] = {
    "estimator": ESTIMATORS,
    "projector": PROJECTORS,
    "transport": TRANSPORTS,
    "residual": RESIDUALS,
    "blocks": LAYERS,
}
_LOOSE = ("projects", "dense")


def _set(method: Method, word: str) -> Method:
    """A method with one setting of one of its parts replaced, as `PART.NAME=VALUE` says."""
    path, equals, text = word.partition("=")
    part, dot, name = path.strip().partition(".")
    if not equals or not (dot and part in _PARTS and name or not dot and part in _LOOSE):
        raise UsageError(
            f"set '{word}' names no setting; write PART.NAME=VALUE with one of {', '.join(_PARTS)} as the part, or "
            f"{', '.join(f'{loose}=VALUE' for loose in _LOOSE)}"
        )
    try:
        value = json.loads(text)
    except ValueError:
        value = text.strip()  # words need no quotes
    if not dot:
        return _checked(word, getattr(method, part), value, lambda new: replace(method, **{part: new}))
    owner = getattr(method, _PARTS[part])
    if part == "optimizer":
        return replace(method, optimizer=_set_optimizer(owner, word, name, value))
    known = f"{part} '{key_of(_REGISTRIES[part], owner)}'"
    now = setting(owner, name, _ABSENT)
    if now is _ABSENT or is_dataclass(now):
        settings = sorted(n for n, v in vars(owner).items() if not is_dataclass(v))
        raise UsageError(
            f"{known} has no setting '{name}' (set '{word}'); it has {', '.join(settings) or 'none'}"
        )
    field = _PARTS[part]
    return _checked(word, now, value, lambda new: replace(method, **{field: changed(owner, **{name: new})}))


def _set_optimizer(rule: OptimizerRule, word: str, name: str, value: Any) -> OptimizerRule:
    """A rule with one more setting."""
    if name not in rule.known:
        raise UsageError(
            f"optimizer '{rule.name}' has no setting '{name}' (set '{word}'); it has {', '.join(rule.known)}"
        )
    settings = {**rule.settings, name: tuple(value) if isinstance(value, list) else value}
    rule = replace(rule, settings=settings)
    try:
        rule.build(
            [torch.nn.Parameter(torch.zeros(1, 1))], lr=1e-3
        )  # the class itself knows what is possible
    except (TypeError, ValueError, RuntimeError) as error:
        raise UsageError(f"set '{word}': {value!r} is not possible ({error}); give another value") from error
    return rule


def _checked(word: str, now: Any, value: Any, build: Callable[[Any], Method]) -> Method:
    """What `build` makes of a value of the same kind as the one that is there."""
    kind = type(now)
    if kind is float and type(value) is int:
        value = float(value)
    if now is not None and value is not None and type(value) is not kind:
        raise UsageError(f"set '{word}': {value!r} cannot stand where {now!r} does; give one of its kind")
    try:
        return build(value)
    except TypeError as error:
        raise UsageError(f"set '{word}': {value!r} is not possible ({error}); give another value") from error


def _ranks(given: str | Mapping[str, int]) -> tuple[tuple[str, int], ...]:
    """Pairs of `q_proj=16,mlp=64`, or of a mapping."""
    if isinstance(given, Mapping):
        return tuple(given.items())
    given = str(given)
    found = []
    for pair in given.split(","):
        part, _, rank = pair.partition("=")
        if not part.strip() or not rank.strip().isdecimal():
            raise UsageError(
                f"ranks '{given}': '{pair}' is no NAME=RANK; write parts of weights' names, such as q_proj=16,mlp=64"
            )
        found.append((part.strip(), int(rank)))
    return tuple(found)


_ABSENT = object()


def _at_point(estimator: Any, cls: type) -> Any:
    """The estimator evaluated at another point, with default settings unless it is already."""
    if type(estimator) is cls:
        return estimator
    inner = estimator.inner if type(estimator) in POINTS.values() else estimator
    return cls(inner, Spsa(eps=1e-3)) if cls is Ascent else cls(inner)


def _with(part: Any, owner: str, **settings: Any) -> Any:
    given = {name: plain(value) for name, value in settings.items() if value is not None}
    for name in given:
        if setting(part, name, _ABSENT) is _ABSENT:
            raise UsageError(f"{owner} has no setting '{name}'; leave it out")
    return changed(part, **given) if given else part
