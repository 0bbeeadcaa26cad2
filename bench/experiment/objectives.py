"""What models of the experiment learn: digits.

Dimension key: B strings of a batch, T frames, V tokens.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.experiment.data import DigitBatch
from bench.experiment.models import BLANK


def ctc(model: nn.Module, batch: DigitBatch) -> Tensor:
    """CTC's loss, a mean over digits and strings."""
    logits, _ = model(batch.waveforms)
    log_probs = logits.float().log_softmax(-1).transpose(0, 1)
    frames = torch.full_like(batch.counts, log_probs.shape[0])
    return F.ctc_loss(log_probs, batch.labels.clamp(min=0), frames, batch.counts, blank=BLANK)
