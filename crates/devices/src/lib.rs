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
//!
//! A machine puts them together like this:
//!
//! * [`pci::PciRoot::new`] with the BAR windows; its [`config_ports`](pci::PciRoot::config_ports)
//!   on the port bus, its [`ecam`](pci::PciRoot::ecam) and one
//!   [`window`](pci::PciRoot::window) per BAR window on the MMIO bus;
//! * a device, for example [`virtio::blk::VirtioBlk`], in a [`virtio::VirtioPci`], into a slot by
//!   [`pci::PciRoot::add`];
//! * [`serial::Serial`] with a [`console_hub::ConsoleHub`] as its output (and the serial port as the
//!   hub's input), [`acpi_pm::AcpiPm`], [`i8042::I8042`] and [`cmos::Cmos`] on the port bus;
//! * all of them in one list of [`lifecycle::Component`]s, started in order, quiesced and resumed
//!   together.

pub mod acpi_pm;
pub mod bus;
pub mod cmos;
pub mod console_hub;
pub mod i8042;
pub mod interrupt;
pub mod lifecycle;
pub mod observations;
pub mod pci;
pub mod serial;
mod sync;
#[cfg(any(test, feature = "testing"))]
pub mod testing;
mod throttle;
pub mod virtio;

#[cfg(test)]
mod saved_tests;
