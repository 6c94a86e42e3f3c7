//! Saved state as a damaged or hostile process may send it: any bytes as a set of records, any payload
//! with a checksum that is right, and a transport's record that makes sense in every field but those
//! that the fuzzer chose.
#![no_main]

use std::sync::Arc;

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use strake_devices::acpi_pm::{AcpiPm, PowerEvents};
use strake_devices::cmos::Cmos;
use strake_devices::interrupt::IrqLine;
use strake_devices::lifecycle::Component;
use strake_devices::serial::{ConsoleOutput, Serial};
use strake_devices::testing::Host;
use strake_devices::virtio::rng::{SavedRng, VirtioRng};
use strake_devices::virtio::{SavedVirtioPci, VirtioPci};
use strake_fuzz::Address;
use strake_state::Records;

#[derive(Debug, Arbitrary)]
enum Input {
    Bytes(Vec<u8>),
    Payload {
        which: u8,
        version: u16,
        payload: Vec<u8>,
    },
    Transport {
        status: u8,
        accepted: u64,
        msix: (bool, bool),
        vectors: Vec<([u8; 16], bool)>,
        queue: (u16, bool, Address, Address, Address, u16),
        command: u8,
        base: u64,
        needs_reset: bool,
    },
}

struct Nobody;

impl IrqLine for Nobody {
    fn raise(&self) {}
}

impl ConsoleOutput for Nobody {
    fn write(&self, _: &[u8]) {}
}

impl PowerEvents for Nobody {
    fn power_off(&self) {}
    fn reset(&self) {}
}

fn rng(host: &Host) -> Arc<VirtioPci<VirtioRng>> {
    let device = VirtioRng::new("rng");
    let function = VirtioPci::new(device, host.ram.clone(), &*host.msi, host.bells.clone());
    let function = function.expect("a device");
    host.pci.add(1, function.clone()).expect("a free slot");
    function
}

/// A record of a device that really was.
fn real() -> SavedVirtioPci {
    let host = Host::default();
    let function = rng(&host);
    function.start().expect("it starts");
    function.quiesce().expect("it has no workers");
    let mut records = Records::default();
    function.save(&mut records).expect("it is saved");
    records.take("rng").expect("its record")
}

fn restore(component: &dyn Component, mut records: Records) {
    match component.restore(&mut records) {
        Ok(()) => component.resume().unwrap_or(()),
        Err(seen) => assert!(!seen.text().is_empty() && !seen.remedy().is_empty()),
    }
}

fuzz_target!(|input: Input| {
    match input {
        Input::Bytes(bytes) => {
            if let Ok(records) = Records::decode(&bytes) {
                assert_eq!(Records::decode(&records.encode()).ok(), Some(records));
            }
        }
        Input::Payload {
            which,
            version,
            payload,
        } => {
            let nobody = Arc::new(Nobody);
            let host = Host::default();
            let (component, kind): (Arc<dyn Component>, _) = match which % 5 {
                0 => (Serial::new("x", nobody.clone(), nobody), "serial"),
                1 => (AcpiPm::new(nobody.clone(), nobody), "acpi-pm"),
                2 => (Cmos::new(), "cmos"),
                3 => (host.pci.clone(), "pci-root"),
                _ => (rng(&host), "virtio-pci"),
            };
            let mut records = Records::default();
            records.put_any(component.name(), kind, version % 3, payload);
            restore(&*component, records);
        }
        Input::Transport {
            status,
            accepted,
            msix,
            vectors,
            queue,
            command,
            base,
            needs_reset,
        } => {
            let mut saved = real();
            saved.status = status;
            saved.accepted = accepted & saved.offered;
            (saved.msix_enabled, saved.msix_masked) = msix;
            for (vector, (raw, pending)) in saved.vectors.iter_mut().zip(vectors) {
                (vector.raw, vector.pending) = (raw, pending);
            }
            if let Some(only) = saved.queues.first_mut() {
                (only.size, only.enabled) = (queue.0, queue.1);
                (only.descriptors, only.driver, only.device) = (queue.2.0, queue.3.0, queue.4.0);
                only.vector = queue.5;
            }
            saved.config[4] = command & 6;
            saved.config[0x10..0x18].copy_from_slice(&(base & !0x7fff | 4).to_le_bytes());
            saved.needs_reset = needs_reset;
            let mut records = Records::default();
            let put = records
                .put("rng", &saved)
                .and_then(|()| records.put("rng", &SavedRng {}));
            put.expect("it fits");
            let host = Host::default();
            restore(&*rng(&host), records);
        }
    }
});
