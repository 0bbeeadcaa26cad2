"""Ties to model libraries, none of which is imported before the user imports it.

Importing this package costs nothing: it only asks for what registers itself to be imported once
transformers is there, and once the first model is to be converted.
"""

from lowbit_kernels.integrations.import_hook import when_imported

when_imported("lowbit_kernels.conversion.registry", "lowbit_kernels.integrations.adapters")
when_imported(
    "transformers.modeling_utils",
    "lowbit_kernels.integrations.huggingface",
    "lowbit_kernels.integrations.huggingface_attention",
)
when_imported(
    "torch.utils.flop_counter",
    "lowbit_kernels.attention.flops",
    "lowbit_kernels.conv1d.flops",
    "lowbit_kernels.fake_quant.flops",
    "lowbit_kernels.matmul.flops",
)
