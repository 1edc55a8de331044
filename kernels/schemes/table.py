"""All schemes, by name. A new one is a file beside this one, and a row here."""

from int8fx.kernels.scheme import Scheme
from int8fx.kernels.schemes import affine, int8, weight_only

DEFAULT = int8.LLM_INT8.name

SCHEMES: dict[str, Scheme] = {
    scheme.name: scheme
    for scheme in (
        int8.LLM_INT8,
        affine.LLM_INT8_ZEROPOINT,
        affine.ABSMAX_TENSOR,
        int8.ABSMAX_ROW,
        int8.ABSMAX_VECTOR,
        affine.ZEROPOINT_TENSOR,
        affine.ZEROPOINT_VECTOR,
        weight_only.W8A16,
        weight_only.W8A16_GROUP,
    )
}
