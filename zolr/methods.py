"""Method: one choice of estimator, projector, optimizer and transport; METHODS: the literature as rows."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from difflib import get_close_matches
from typing import Any, Literal

from zolr.errors import UsageError
from zolr.estimators import ESTIMATORS, PARADIGMS, POINTS, Estimator
from zolr.estimators.ascent import Ascent
from zolr.estimators.backprop import Backprop
from zolr.estimators.forward import Forward
from zolr.estimators.lookahead import Lookahead
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
from zolr.projectors.range_finder import RangeFinder
from zolr.projectors.stiefel import Stiefel
from zolr.projectors.svd import Svd
from zolr.projectors.two_sided import TwoSidedHaar
from zolr.residuals import RESIDUALS, Residual
from zolr.residuals.drop import Drop
from zolr.transports import TRANSPORTS, Transport
from zolr.transports.align import Align
from zolr.transports.keep import Keep
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
        scale: factor on what a dense method lifts (GaLore's alpha).
        projects: matrices that have a subspace: "all", or categories joined by "+" (see `engine.selection`); others
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

    def __post_init__(self) -> None:
        every = self.refresh_every
        if every is not None and (isinstance(every, bool) or not isinstance(every, int) or every < 1):
            raise UsageError(
                f"refresh_every = {every!r} is no number of steps; use at least 1, or none to never refresh"
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
        if not self.scale > 0 or (self.scale != 1.0 and not self.dense):
            raise UsageError(
                f"scale = {self.scale} must be positive, and is for dense methods; give the learning rate instead"
            )
        if self.dense and self.paradigm != "fo":
            raise UsageError(f"paradigm '{self.paradigm}' gives no dense gradient; use --paradigm fo")
        if self.residual.dense and not self.dense:
            raise UsageError(
                f"residual '{key_of(RESIDUALS, self.residual)}' needs dense gradients, which this method never forms; "
                "use residual 'drop', or a dense method such as 'galore'"
            )
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
        if isinstance(self.transport, Align) and self.optimizer.degrees is None:
            raise UsageError(
                f"transport 'align' does not know the state of optimizer '{self.optimizer.name}'; "
                "use transport 'reset' or 'keep'"
            )

    @property
    def paradigm(self) -> str:
        """ "fo" (backprop), "zo" (forward only) or "fwd" (forward mode)."""
        return self.estimator.paradigm


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
        if isinstance(self.rank, bool) or not isinstance(self.rank, int) or self.rank < 1:
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
        train: which weights it trains per paradigm unless the user says otherwise (see `engine.selection`); all of
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
            raise UsageError(
                f"method '{self.name}' runs under {', '.join(self.paradigms)}, not under '{paradigm}'; "
                "use method 'stiefel', or another paradigm"
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
        "the gradient in a Haar-random subspace, the optimal law when nothing is known of it (default)",
        {
            "zo": Method(Spsa(), Stiefel(rank=16), SGD, Reset(), 200),
            "fo": Method(Backprop(), Stiefel(rank=32), ADAMW, Reset(), 100),
            "fwd": Method(Forward(), Stiefel(rank=16), ZO_ADAMW, Reset(), 200),
        },
        "W + B Pᵀ, P = sqrt(n/r) Q, Q Haar on the Stiefel manifold; train B, fold every refresh_every steps",
        "arXiv 2603.20632",
        "paper (law and scale); rank, window and optimizer are our defaults",
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
        lr={"zo": 1e-6},
    ),
    Row(
        "subzero",
        "forward-only SGD between two orthonormal bases",
        {"zo": Method(Spsa(eps=1e-3, law="gaussian"), TwoSidedHaar(rank=24), SGD, Reset(), 1000)},
        "W <- W - lr c s U Z Vᵀ, s = sqrt(m n) / r, U and V orthonormal, kept for refresh_every steps",
        "arXiv 2410.08989",
        "released code (norm alignment s)",
        lr={"zo": 1e-6},
    ),
    Row(
        "rso",
        "Adam on random Gaussian subspaces, each trained for a while from zero",
        {"fo": Method(Backprop(), Gaussian(rank=16), ADAMW, Reset(), 100)},
        "W + B Pᵀ, P entries N(0, 1/r); a few Adam steps on B, then fold and draw again",
        "arXiv 2502.07222",
        "paper's practice (Gaussian); its proximal term is the restart of B at zero",
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
        "two backward passes a step (one along 'noise'); the variant along the gradient of the step before is left out: it needs "
        "a copy of that gradient as state",
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
        lr={"fo": 1e-2},
    ),
    Row(
        "adamw",
        "full AdamW by backprop, the baseline of every table",
        {"fo": Method(Backprop(), Identity(), ADAMW)},
        "torch.optim.AdamW on the weights",
        "arXiv 1711.05101",
        "torch",
        lr={"fo": 5e-5},
    ),
    Row(
        "muon",
        "Muon on matrices and AdamW on vectors, by backprop",
        {"fo": Method(Backprop(), Identity(), OptimizerRule("muon"))},
        "W <- W - lr s NewtonSchulz(momentum of G)",
        "Jordan et al. 2024",
        "torch.optim.Muon, learning rate scaled to match AdamW's step size",
        lr={"fo": 2.5e-4},
    ),
    Row(
        "lora",
        "AdamW on low-rank matrices beside every linear map but the head, the weights themselves fixed (PEFT's)",
        {
            "fo": Method(Backprop(), Identity(), ADAMW),
            "zo": Method(Spsa(), Identity(), ZO_ADAMW),
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
    if name not in registry:
        raise nearest(kind, name, list(registry))
    return registry[name]


def _shared(part: Any, cls: type) -> dict[str, Any]:
    """Settings of `part` that class `cls` has too, so that changing the law keeps rank, side, eps, ..."""
    names = {f.name for f in fields(cls)}
    return {f.name: getattr(part, f.name) for f in fields(part) if f.name in names}


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
    residual: str | None = None,
    point: str | None = None,
    reach: float | None = None,
    blocks: str | None = None,
    switch_every: int | None = None,
    outside: str | None = None,
    accumulate_in: str | None = None,
    clip_by: str | None = None,
    tables: str | None = None,
) -> Method:
    """A row of METHODS with some of its parts or settings replaced.

    Args:
        method: name of a row; "stiefel" when not given.
        paradigm: "fo", "zo" or "fwd"; the row's default when not given.

    Raises:
        UsageError: an unknown name (with the nearest known one), or a setting that the part does not have.
    """
    row: Row = _lookup("method", METHODS, method or "stiefel")
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
            result = replace(result, estimator=cls(**_shared(result.estimator, cls)))
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
            reach=reach,
        ),
    )
    if optimizer is not None and optimizer != result.optimizer.name:
        result = replace(result, optimizer=OptimizerRule(optimizer))
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
    if accumulate_in is not None:
        result = replace(result, accumulate=accumulate_in)  # pyright: ignore[reportArgumentType]
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
        result = replace(result, refresh_every=refresh_every)
    return result


def _at_point(estimator: Any, cls: type) -> Any:
    """The estimator evaluated at another point, with default settings unless it is already."""
    if type(estimator) is cls:
        return estimator
    inner = estimator.inner if type(estimator) in POINTS.values() else estimator
    return cls(inner, Spsa(eps=1e-3)) if cls is Ascent else cls(inner)


def _with(part: Any, owner: str, **settings: Any) -> Any:
    given = {name: value for name, value in settings.items() if value is not None}
    known = {f.name for f in fields(part)}
    # what an evaluation point does not know is for what it wraps, or for the probes that it sends ahead
    within = [getattr(part, name) for name in ("inner", "guess") if name in known]
    inner: dict[str, dict[str, Any]] = {}
    for name in given:
        if name not in known:
            place = next((p for p in within if name in {f.name for f in fields(p)}), None)
            if place is None:
                raise UsageError(f"{owner} has no setting '{name}'; leave it out")
            field_name = "inner" if place is within[0] else "guess"
            inner.setdefault(field_name, {})[name] = given[name]
    given = {name: value for name, value in given.items() if name in known}
    given |= {name: replace(getattr(part, name), **more) for name, more in inner.items()}
    return replace(part, **given) if given else part
