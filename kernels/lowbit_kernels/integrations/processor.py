"""Processors of quantized models: they must hand out the attention mask."""

from typing import Any


def prepare_processor(processor: Any) -> Any:
    """Make a processor or feature extractor of raw waveforms return attention masks.

    Base-size checkpoints say ``return_attention_mask: false``, because their GroupNorm could not
    use one; a quantized model can. Save the result beside the model.

    Args:
        processor: a transformers processor or feature extractor; changed in place.

    Returns:
        The processor.
    """
    extractor = getattr(processor, "feature_extractor", processor)
    if getattr(extractor, "feature_size", None) == 1:
        extractor.return_attention_mask = True
    return processor
