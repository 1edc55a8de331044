"""Which batches of experts ``quantize_`` takes, and why it leaves the others to the backend."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from int8fx.kernels.schemes import experts
from int8fx.kernels.schemes.scheme import Choice
from int8fx.options import Options
from int8fx.passes.linears.decision import Decision
from int8fx.passes.linears.select import only_reason, size_reason, skip_reason
from int8fx.weights import state_dict, structure
from int8fx.weights.algorithms.methods import NEAREST
from int8fx.weights.sites import ALREADY
from int8fx.weights.tensor import QuantizedWeight

EXPERTS = "experts in one batch of matrices: the backend quantises them when it compiles the model"
NO_ORDER = (
    "experts of a module that has no is_transposed, which says what their rows are: the backend "
    "quantises them when it compiles the model"
)
OTHER_METHOD = f"experts in one batch of matrices: only method={NEAREST!r} quantises them"
LEFT = (EXPERTS, NO_ORDER, OTHER_METHOD)  # reasons that nobody asked for


@dataclass(eq=False)
class ExpertSite:
    """One batch of matrices ``[E, N, K]``, or ``[E, K, N]``, and why it stays as it is (empty: it does
    not).

    Attributes:
        path: of the parameter, ``name`` of ``module``.
    """

    path: str
    module: nn.Module
    name: str
    choice: Choice
    reason: str = ""

    @property
    def weight(self) -> Tensor:
        return getattr(self.module, self.name)

    @property
    def transposed(self) -> bool:
        """Whether the matrices are ``[K, N]``, as the experts of transformers say of theirs."""
        return self.module.is_transposed is True

    @property
    def decision(self) -> Decision:
        return structure.of_experts(self.path, self.weight, self.reason)

    def quantized(self) -> nn.Parameter:
        weight = QuantizedWeight.quantized(self.weight, self.choice, self.transposed)
        return nn.Parameter(weight, requires_grad=False)


def expert_sites(model: nn.Module, options: Options, method: str = NEAREST) -> list[ExpertSite]:
    """Of every batch that a model calls experts."""
    held = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    sites = []
    for path, batch in structure.experts(model):
        owner, _, name = path.rpartition(".")
        site = ExpertSite(path, model.get_submodule(owner), name, options.choice(path))
        site.reason = skip_reason(path, options.skip) or only_reason(path, options.only)
        site.reason = site.reason or _reason(site, method, held[id(batch)])
        sites.append(site)
    return sites


def _reason(site: ExpertSite, method: str, holders: int) -> str:
    weight, choice = site.weight, site.choice
    if isinstance(weight, QuantizedWeight):
        return f"{ALREADY}{weight.weight_format.name}"
    if choice.weight_format.bits == 8 or experts.lowering(choice) is None:
        return EXPERTS
    if getattr(site.module, "is_transposed", None) not in (True, False):
        return NO_ORDER
    if method != NEAREST:
        return OTHER_METHOD
    if type(weight) not in (Tensor, nn.Parameter):
        return f"weight is a {type(weight).__name__}, no plain tensor"
    if holders > 1:
        return f"another module holds {site.name} as well"
    E, *matrix = weight.shape
    N, K = matrix[::-1] if site.transposed else matrix
    refusal = None if weight.is_meta else choice.refusal(weight.device.type)
    return size_reason((E, N, K), 3) or refusal or ""


def quantize_experts(sites: Sequence[ExpertSite]) -> Iterator[None]:
    """Quantises the accepted ones in place, one at each step."""
    accepted = [site for site in sites if not site.reason]
    for module in dict.fromkeys(site.module for site in accepted):
        state_dict.attach(module)
    for site in accepted:
        setattr(site.module, site.name, site.quantized())
        yield


def left(decisions: Sequence[Decision]) -> list[Decision]:
    """Those that stay in float, though nobody asked for it."""
    return [decision for decision in decisions if decision.reason in LEFT]
