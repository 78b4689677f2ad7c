"""The product of a layer in real integer arithmetic, as the deployed layer computes it.

The input becomes codes of 8 bits, the weight is packed when it has changed, the sums are integers of 32 bits and become
floats once, times ``s_x * s_w``. :func:`why_not` says which layers cannot have it on which device;
:func:`integer_forward` computes those that can.
"""

from amct_lightning.modules.integer.forward import integer_forward
from amct_lightning.modules.integer.numbers import Numbers
from amct_lightning.modules.integer.packed import PackedWeight
from amct_lightning.modules.integer.reasons import why_not

__all__ = ["Numbers", "PackedWeight", "integer_forward", "why_not"]
