"""All schemes, by name. A new one is a file beside this one, and a row here."""

from int8fx.kernels.scheme import Scheme
from int8fx.kernels.schemes import int8

DEFAULT = int8.LLM_INT8.name

SCHEMES: dict[str, Scheme] = {
    scheme.name: scheme
    for scheme in (
        int8.LLM_INT8,
        int8.ABSMAX_ROW,
        int8.ABSMAX_VECTOR,
    )
}
