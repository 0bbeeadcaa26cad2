"""Ties to model libraries, none of which is imported before the user imports it.

Importing this package costs nothing: it only asks to be called once transformers is there, and once
the first model is to be converted.
"""

from lowbit_kernels.integrations.import_hook import when_imported


def _register_adapters() -> None:
    from lowbit_kernels.integrations.adapters import register

    register()


def _register_with_transformers() -> None:
    # both register when imported; whichever caused this call is imported in part and goes on
    import lowbit_kernels.integrations.huggingface
    import lowbit_kernels.integrations.huggingface_attention  # noqa: F401


def _register_flop_formulas() -> None:
    import lowbit_kernels.conv1d.flops
    import lowbit_kernels.fake_quant.flops
    import lowbit_kernels.matmul.flops  # noqa: F401


when_imported("lowbit_kernels.conversion.registry", _register_adapters)
when_imported("transformers.modeling_utils", _register_with_transformers)
when_imported("torch.utils.flop_counter", _register_flop_formulas)
