"""What placement decides by: the times of one expert of a store, over the link, on a device, on the host."""

from foregate.checkpoint.architecture import inspect_architecture
from foregate.checkpoint.source import load_config
from foregate.checkpoint.store import Store
from foregate.engine.costs import measure_costs
from foregate.kernels import AUTO, choose_kernel
from foregate.kernels.slots import choose_slot_kernel
from foregate.memory.device import Device
from foregate.memory.host import HostRecords
from foregate.memory.needs import Tier
from foregate.memory.upload import HostToDevice
from foregate.schedule import Costs


def expert_costs(store: Store, device: Device) -> Costs:
    """Measured on the first layer, with room for one record in host memory and on the device. Raises ForegateError."""
    layer = store.layers[0]
    module = inspect_architecture(load_config(store.path)).model.get_submodule(layer.module)  # without weights
    records = HostRecords(store, device, store.record_bytes, readers=1)
    try:
        records.fill()
        slots = device.slots(1, store.record_bytes)
        slot_kernel = choose_slot_kernel(AUTO, module, layer.layout, slots)
        host_kernel = choose_kernel(AUTO)[0](module, False)
        carrier = HostToDevice(records, device, slots)
        return measure_costs(device, carrier, records, slot_kernel, host_kernel, Tier.of(device).dtype)
    finally:
        records.close()
