//! The guest's devices: buses, PCI, virtio over PCI, the serial port, power management.
//!
//! Everything that a guest does to a device is hostile until proven otherwise. Three kinds of
//! threads meet here:
//!
//! * **vCPU threads** call [`bus::Bus`] for each access that exits. They reach a device's
//!   registers and never wait for a backend longer than a named bound.
//! * **Workers**, one or more per virtio device, own the virtqueues from `DRIVER_OK` to reset.
//! * **The machine's own thread** drives [`lifecycle::Component`] and changes from outside (link,
//!   power button, console input).

pub mod acpi_pm;
pub mod bus;
pub mod cmos;
pub mod i8042;
pub mod interrupt;
pub mod lifecycle;
pub mod observations;
pub mod pci;
pub mod serial;
pub mod virtio;

// Entry points (each module documents its own):
//
// pci::PciRoot::new(PciWindows { mmio32, mmio64 }) -> Arc<PciRoot>
//   root.add(slot: u8, Arc<dyn PciFunction>) -> Result<()>            PciFunction: Component
//   PciRoot::config_ports(&root) -> Arc<dyn BusDevice>                register at ports 0xcf8..0xd00
//   PciRoot::ecam(&root) -> Arc<dyn BusDevice>                        register at the ECAM window
//   PciRoot::window(&root, base: u64) -> Arc<dyn BusDevice>           register each BAR window
// virtio::VirtioPci::new(device: D, Ram, Arc<dyn MsiBroker>, Arc<dyn Doorbells>) -> Result<Arc<VirtioPci<D>>>
// virtio::blk::VirtioBlk::new(name, Arc<LiveDisk>, BlkConfig { queues, serial, read_only }) -> Result<VirtioBlk>
// virtio::net::VirtioNet::new(name, tap: OwnedFd, mac: [u8; 6]) -> Result<VirtioNet>
// virtio::console::VirtioConsole::new(name, stream: OwnedFd) -> Result<VirtioConsole>
// virtio::rng::VirtioRng::new(name) -> VirtioRng
// serial::Serial::new(name, Arc<dyn IrqLine>, Arc<dyn ConsoleOutput>) -> Arc<Serial>    8 ports
// console_hub::ConsoleHub::new(name, log: File) -> Result<Arc<ConsoleHub>>   is a ConsoleOutput
//   hub.attach(OwnedFd stream) -> Result<()>, hub.connect_input(Arc<dyn ConsoleInput>) (Serial is one)
// acpi_pm::AcpiPm::new(Arc<dyn IrqLine>, Arc<dyn PowerEvents>) -> Arc<AcpiPm>
//   .event_block() (4 ports), .control_block() (2 ports), .reset_register() (1 port), .press_power_button()
// i8042::I8042::new(Arc<dyn PowerEvents>) -> Arc<I8042>                       ports 0x60..0x65
// cmos::Cmos::new() -> Arc<Cmos>                                              ports 0x70..0x72
