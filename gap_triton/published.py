"""The older name of `gap_triton.models`."""

import sys

from . import models
from .models import minigpt_v2, shikra, visual_decoder

for module in (minigpt_v2, shikra, visual_decoder):
    sys.modules[f"{__name__}.{module.__name__.rpartition('.')[2]}"] = module
sys.modules[__name__] = models
