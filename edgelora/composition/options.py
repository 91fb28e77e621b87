"""How adapters are composed, checked where it is made."""

from dataclasses import dataclass

from edgelora.errors import EdgeLoraError

METHODS = (
    "linear", "cat", "svd", "ties", "dare_linear", "dare_ties", "ties_svd", "dare_linear_svd",
    "dare_ties_svd", "magnitude_prune", "magnitude_prune_svd",
)  # fmt: skip
MAJORITY_SIGNS = ("total", "frequency")


@dataclass(frozen=True)
class ComposeOptions:
    """Names and meanings are PEFT's combination_type, svd_rank, density, majority_sign_method.

    None leaves rank to the adapters (their largest), majority_sign at "total" and seed at 0.
    """

    method: str = "cat"
    rank: int | None = None
    density: float | None = None  # share of the values that is kept
    majority_sign: str | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        _one_of("method", self.method, METHODS)
        self._check_use("rank", self.rank, "svd and …_svd", used=self.truncates)
        self._check_use("density", self.density, "ties, dare and magnitude_prune", used=self.prunes)
        self._check_use("majority sign", self.majority_sign, "ties", used="ties" in self.method)
        self._check_use("seed", self.seed, "dare", used=self.draws)
        if self.rank is not None and (type(self.rank) is not int or self.rank < 1):
            raise EdgeLoraError(f"rank {self.rank}: at least 1")
        self._check_density()
        if self.majority_sign is not None:
            _one_of("majority sign", self.majority_sign, MAJORITY_SIGNS)
        if self.seed is not None and not (type(self.seed) is int and 0 <= self.seed < 2**64):
            raise EdgeLoraError(f"seed {self.seed}: an integer from 0 to 2⁶⁴ − 1")

    @property
    def truncates(self) -> bool:
        """Whether a delta becomes factors by singular values."""
        return self.method.endswith("svd")

    @property
    def prunes(self) -> bool:
        """Whether values are left out, which PEFT's functions do."""
        return self.method not in ("linear", "cat", "svd")

    @property
    def draws(self) -> bool:
        return self.method.startswith("dare")

    def _check_use(self, name: str, value: object, where: str, *, used: bool) -> None:
        if value is not None and not used:
            raise EdgeLoraError(f"{name} {value} with method {self.method}: only for {where}")

    def _check_density(self) -> None:
        if not self.prunes:
            return
        if self.density is None:
            raise EdgeLoraError(
                f"method {self.method}: needs --density, the share of the values to keep, as 0.5"
            )
        if isinstance(self.density, bool | str) or not 0 < self.density <= 1:
            raise EdgeLoraError(f"density {self.density}: above 0, at most 1")


def _one_of(what: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise EdgeLoraError(f"{what} {value!r}: one of {', '.join(allowed)}")
