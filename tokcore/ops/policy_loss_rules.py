"""What a policy loss is: its surrogate, whose ratio, which KL term, how tokens are averaged.

The classes describe; policy_loss computes. tokcore.algorithms.grpo has the methods by name.
"""

import math
from dataclasses import dataclass, field

from tokcore import _checks

LEVELS = {"token": 0, "sequence": 1, "sequence_token": 2, "sequence_sum": 3}
KL_ESTIMATORS = {"k1": 1, "k2": 2, "k3": 3, "abs": 4}
AGGREGATIONS = {
    "token-mean": 0,
    "seq-mean-token-mean": 1,
    "seq-mean-token-sum": 2,
    "seq-mean-token-sum-norm": 3,
    "token-sum": 4,
}
_INF = math.inf


# --- surrogates: the loss of one token, c its ratio, A its advantage, l its log-probability ------


@dataclass(frozen=True)
class Clip:
    """-min(min(c, delta) A, clip(c, 1 - low, 1 + high) A); where A < 0 at most -dual A (PPO)."""

    low: float = 0.2
    high: float = 0.2
    delta: float = _INF  # upper bound of c on both signs (TRL's two-sided clip)
    dual: float = _INF  # dual clip of verl, slime, OpenRLHF: 3.0 there


@dataclass(frozen=True)
class CispoCap:
    """-sg(min(c, cap)) A l: CISPO as TRL and Liger have it, ``cap`` bounds the ratio itself."""

    cap: float = 5.0


@dataclass(frozen=True)
class CispoBand:
    """-sg(clip(c, 1 - low, 1 + high)) A l: CISPO as verl and slime have it."""

    low: float = 0.2
    high: float = 0.2


@dataclass(frozen=True)
class Sapo:
    """-(4 / t) sigmoid(t (c - 1)) A, t by the sign of A: a gate instead of a clip."""

    positive: float = 1.0
    negative: float = 1.05


@dataclass(frozen=True)
class Vespo:
    """-sg(phi) A l with phi = exp(lambda + k ln w - lambda w), w the sequence's bounded ratio."""

    k_positive: float = 2.0
    lambda_positive: float = 3.0
    k_negative: float = 3.0
    lambda_negative: float = 2.0


@dataclass(frozen=True)
class Gmpo:
    """-q A, q the sequence's geometric mean of ratios whose logarithms are clipped, each alone."""

    low: float = 0.4
    high: float = 0.4


@dataclass(frozen=True)
class Dppo:
    """-[kept] A c + penalty ln(c)^2; kept unless the probability moved past a bound, A's way."""

    low: float = 0.2
    high: float = 0.2
    penalty: float = 1e-3


@dataclass(frozen=True)
class Reinforce:
    """-A l."""


Surrogate = Clip | CispoCap | CispoBand | Sapo | Vespo | Gmpo | Dppo | Reinforce


@dataclass(frozen=True)
class Kl:
    """coefficient * KL(policy || reference), estimated from the token with d = ln q - ln p.

    k1 = -d, k2 = d^2 / 2, k3 = e^d - d - 1, abs = |d|. ``corrected`` multiplies it by the ratio,
    with its gradient (DeepSeek-V3.2). ``log_limit`` bounds d, ``limit`` the estimate (verl: 20 and
    10); beyond them there is no gradient.
    """

    coefficient: float
    estimator: str = "k3"
    corrected: bool = False
    log_limit: float = _INF
    limit: float = _INF


@dataclass(frozen=True)
class Sampler:
    """The ratio old / sampler, where another engine sampled; it multiplies the surrogate.

    Of each token, or of a sequence as a whole (its product). ``bound`` "truncate" clamps it to
    [least, most], "mask" drops what is outside.
    """

    level: str = "token"
    bound: str = "truncate"
    most: float = 3.0
    least: float = 0.0


@dataclass(frozen=True)
class PolicyLoss:
    """The rules of a policy loss; docs/algorithms/grpo.md has the table of methods.

    Args:
        surrogate: one of the classes of this module.
        level: whose ratio c is, with r = log-probability - old log-probability: "token" (exp r),
            "sequence" (exp of the mean of r, GSPO), "sequence_token" (that value, each token's
            gradient; GSPO-token), "sequence_sum" (exp of the sum of r; RLOO).
        kl: the KL term. Default None.
        aggregation: how tokens are averaged, in verl's words: "token-mean" (DAPO, BNPO),
            "seq-mean-token-mean" (GRPO), "seq-mean-token-sum", "seq-mean-token-sum-norm" (the same
            over ``length``; Dr. GRPO), "token-sum".
        length: the constant of "seq-mean-token-sum-norm": the maximum length of a completion.
        count_empty: whether rows without tokens count in a mean over sequences (TRL: yes; verl and
            OpenRLHF: no).
        log_ratio_limit: bound of r, or of the sequence's; beyond it there is no gradient (verl:
            20).
        sampler: the ratio of old to sampler log-probabilities. Default None.
        off_policy_threshold: rows whose mean of (sampler, or old) - policy log-probabilities is
            above it, keep no surrogate where A < 0 (DeepSeek-V3.2).
        top_entropy: the surrogate is kept for this fraction of tokens, those of highest entropy
            (2506.01939). ``entropy_threshold`` of ``policy_loss`` overrides what the tokens at hand
            give.
        entropy_coefficient: weight of the entropy, which is subtracted.
        accumulation_steps: divides the loss; not where a normaliser is given.
        compat: "trl" averages LUSPO over padding and lets VESPO read the ratios of padding.
    """

    surrogate: Surrogate = field(default_factory=Clip)
    level: str = "token"
    kl: Kl | None = None
    aggregation: str = "seq-mean-token-mean"
    length: float | None = None
    count_empty: bool = True
    log_ratio_limit: float = _INF
    sampler: Sampler | None = None
    off_policy_threshold: float = _INF
    top_entropy: float = 1.0
    entropy_coefficient: float = 0.0
    accumulation_steps: int = 1
    compat: str | None = None

    def __post_init__(self) -> None:
        _check_rules(self)

    @property
    def needs_entropy(self) -> bool:
        return self.entropy_coefficient != 0 or self.top_entropy < 1


def _check_rules(rules: PolicyLoss) -> None:
    op = "PolicyLoss"
    if not isinstance(rules.surrogate, Surrogate):
        raise TypeError(f"{op}: surrogate must be Clip, CispoCap, ..., got {rules.surrogate!r}")
    _checks.choice(op, "level", rules.level, LEVELS)
    _checks.choice(op, "aggregation", rules.aggregation, AGGREGATIONS)
    _surrogate(rules.surrogate)
    name = type(rules.surrogate).__name__
    only = {Vespo: "token", Gmpo: "sequence", Dppo: "token", Reinforce: "token"}
    level = only.get(type(rules.surrogate), rules.level)
    if level != rules.level:
        raise ValueError(f"{op}: surrogate {name} goes with level {level!r}, got {rules.level!r}")
    if (rules.aggregation == "seq-mean-token-sum-norm") != (rules.length is not None):
        raise ValueError(
            f"{op}: length is for aggregation 'seq-mean-token-sum-norm' and needed by it, got "
            f"{rules.aggregation!r} and length {rules.length}"
        )
    if rules.length is not None:
        _checks.number(op, "length", rules.length, least=1)
    if not rules.log_ratio_limit > 0:
        raise ValueError(f"{op}: log_ratio_limit must be positive, got {rules.log_ratio_limit}")
    if math.isnan(rules.off_policy_threshold):
        raise ValueError(f"{op}: off_policy_threshold must be a number, got nan")
    _checks.number(op, "top_entropy", rules.top_entropy, least=0, most=1)
    _checks.number(op, "entropy_coefficient", rules.entropy_coefficient, least=-1e30, most=1e30)
    if _checks.integer(op, "accumulation_steps", rules.accumulation_steps) < 1:
        raise ValueError(
            f"{op}: accumulation_steps must be positive, got {rules.accumulation_steps}"
        )
    if rules.compat is not None:
        _checks.choice(op, "compat", rules.compat, {"trl": 1})
    if rules.kl is not None:
        _checks.choice(op, "kl.estimator", rules.kl.estimator, KL_ESTIMATORS)
        _checks.number(op, "kl.coefficient", rules.kl.coefficient, least=0, most=1e30)
        if not (rules.kl.log_limit > 0 and rules.kl.limit > 0):
            raise ValueError(
                f"{op}: kl.log_limit and kl.limit must be positive, got {rules.kl.log_limit} and "
                f"{rules.kl.limit}"
            )
    if rules.sampler is not None:
        _checks.choice(op, "sampler.level", rules.sampler.level, {"token": 0, "sequence": 1})
        _checks.choice(op, "sampler.bound", rules.sampler.bound, {"truncate": 0, "mask": 1})
        if not 0 <= rules.sampler.least <= rules.sampler.most:
            raise ValueError(
                f"{op}: sampler must have 0 <= least <= most, got {rules.sampler.least} and "
                f"{rules.sampler.most}"
            )


def _surrogate(surrogate: Surrogate) -> tuple[int, float, float, float, float]:
    """Its number and parameters for the native operator, checked."""
    s = surrogate
    if isinstance(s, CispoCap):
        number, parameters = 1, (0.0, s.cap, 0.0, 0.0)
        right = s.cap > 0
    elif isinstance(s, CispoBand):
        number, parameters = 1, (1 - s.low, 1 + s.high, 0.0, 0.0)
        right = s.low >= 0 and s.high >= 0
    elif isinstance(s, Sapo):
        number, parameters = 2, (s.positive, s.negative, 0.0, 0.0)
        right = 0 < s.positive < _INF and 0 < s.negative < _INF
    elif isinstance(s, Vespo):
        number = 3
        parameters = (s.k_positive, s.lambda_positive, s.k_negative, s.lambda_negative)
        right = all(math.isfinite(p) for p in parameters)
    elif isinstance(s, Gmpo):
        number, parameters = 4, (s.low, s.high, 0.0, 0.0)
        right = s.low >= 0 and s.high >= 0
    elif isinstance(s, Dppo):
        number, parameters = 5, (s.low, s.high, s.penalty, 0.0)
        right = s.low >= 0 and s.high >= 0 and s.penalty >= 0
    elif isinstance(s, Reinforce):
        number, parameters, right = 6, (0.0,) * 4, True
    else:
        number, parameters = 0, (s.low, s.high, s.delta, s.dual)
        right = s.low >= 0 and s.high >= 0 and s.delta > 0 and s.dual > 1
    if not right:
        raise ValueError(f"PolicyLoss: surrogate has a parameter out of its range, got {s}")
    return number, *(float(p) for p in parameters)


def numbers_of(rules: PolicyLoss, importance: int, by_row: bool) -> tuple:
    """The rules as the native operator takes them, in the order of its schema."""
    kl = rules.kl or Kl(0.0)
    sampler = rules.sampler or Sampler(least=0.0, most=_INF)
    number, *parameters = _surrogate(rules.surrogate)
    return (
        number,
        LEVELS[rules.level],
        0 if rules.kl is None else KL_ESTIMATORS[kl.estimator],
        AGGREGATIONS[rules.aggregation],
        importance,
        sampler.bound == "mask",
        by_row,
        kl.corrected,
        rules.count_empty,
        rules.compat == "trl",
        *parameters,
        float(rules.log_ratio_limit),
        float(kl.coefficient),
        float(kl.log_limit),
        float(kl.limit),
        float(rules.off_policy_threshold),
        float(sampler.least),
        float(sampler.most),
        float(rules.entropy_coefficient),
        float(rules.accumulation_steps),
        float(rules.length or 1.0),
    )
