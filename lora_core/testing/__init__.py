"""Fixtures and laws for other projects' tests.

The fixtures come by themselves wherever lora_core is installed (a pytest plugin); `check_lora`
runs the laws of this library on a model of your own:

    from lora_core.testing import check_lora

    def test_my_model_takes_lora():
        check_lora(MyModel(), torch.randn(2, 8), rank=2)

Importing this package loads no PyTorch: every pytest run imports it.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lora_core.testing.laws import LawError as LawError
    from lora_core.testing.laws import check_lora as check_lora

__all__ = ["LawError", "check_lora"]  # loaded on first use


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'lora_core.testing' has no attribute {name!r}")
    from lora_core.testing import laws

    return getattr(laws, name)
