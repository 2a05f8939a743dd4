"""What a model has that makes a session slower, or less foreseeable, than one would expect."""

from collections.abc import Iterator

from torch import nn

from offload.planning.describe import takes_tokens
from offload.scheduler.hardware import HardwareProfile
from offload.scheduler.model_spec import ActivationSizes, Workload
from offload.session.prepare import workload_of
from offload.storage.devices.base import Device

_ROWS = 512


def notes_on(
    model: nn.Module,
    device: Device,
    activations: ActivationSizes | None,
    hardware: HardwareProfile | None,
    reserved: Workload,
    max_tokens: int | None,
) -> Iterator[str]:
    """A sentence for each.

    Args:
        activations: as they were counted; None where they could not be.
        hardware: the machine; None if it was not measured.
        reserved: what memory is reserved for.
        max_tokens: as asked; None where nobody did.
    """
    default = workload_of(model, reserved.batch_size, max_tokens).total_tokens
    if reserved.total_tokens < default:
        yield (
            f"memory is reserved for sequences of {reserved.total_tokens:,} tokens, since {default:,} do not fit the budget; "
            "max_tokens= says how many there will be"
        )
    if not takes_tokens(model):
        yield "the model takes no tokens: its activations are not known beforehand and not in the budget"
    elif activations is None:
        yield "the model's code does not run without values: its activations are estimated"
    for dtype in {value.dtype for value in model.parameters()} & device.emulated_dtypes:
        yield (
            f"{device.hardware_name} does not compute in {_name(dtype)}: torch emulates it{_cost(_name(dtype), hardware)}; "
            "dtype='float16' (--dtype float16) is native, and rounds the weights"
        )


def _name(dtype: object) -> str:
    return str(dtype).removeprefix("torch.")


def _cost(dtype: str, hardware: HardwareProfile | None) -> str:
    """How much slower than float16, where that was measured."""
    rates = None if hardware is None or hardware.device is None else hardware.device
    if rates is None or not {dtype, "float16"} <= rates.matrix_rates.keys():
        return ", which is slower"
    times = rates.matrix_seconds(1e9, _ROWS, dtype) / rates.matrix_seconds(1e9, _ROWS, "float16")
    return f", and its products of {_ROWS} rows take {times:.1f} times those of float16 here"
