//! Message-signalled interrupts.
//!
//! Each vector has a line number of KVM's routing table (a GSI), an eventfd, and, once the guest
//! has written it, an address and data. Writing the eventfd makes KVM send the message without the
//! monitor. While a vector is masked its eventfd is not connected: what is signalled meanwhile
//! stays in the eventfd's counter, and KVM looks at the counter when it is connected again, so that
//! no interrupt is lost.
//!
//! KVM takes the routing table only as a whole, with the legacy lines in it.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kvm_bindings::{
    KVM_IRQ_ROUTING_IRQCHIP, KVM_IRQ_ROUTING_MSI, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER,
    KVM_IRQCHIP_PIC_SLAVE, KvmIrqRouting, kvm_irq_routing_entry,
    kvm_irq_routing_entry__bindgen_ty_1, kvm_irq_routing_irqchip, kvm_irq_routing_msi,
};
use strake_observe::{Because, OsContext, Result};
use vmm_sys_util::eventfd::EventFd;

use crate::observations::MsiExhausted;
use crate::vm::{Inner, event_fd, step};

/// Lines of the legacy interrupt controllers.
const LEGACY_LINES: u32 = 24;

/// Lines that the 8259 pair has, too.
const PIC_LINES: u32 = 16;

/// The most vectors of a VM. KVM's table has 4096 entries; the legacy lines take 40.
pub const MSI_MAX: u32 = 4000;

/// The routing table.
#[derive(Debug, Default)]
pub(crate) struct Routes {
    table: Mutex<Table>,
}

#[derive(Debug, Default)]
struct Table {
    /// Lines given out so far, from [`LEGACY_LINES`] on.
    given: u32,
    /// Lines that were given back.
    free: Vec<u32>,
    /// The messages, by line.
    messages: BTreeMap<u32, Message>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Message {
    address: u64,
    data: u32,
}

/// One message-signalled interrupt.
#[derive(Debug)]
pub struct MsiVector {
    vm: Arc<Inner>,
    gsi: u32,
    event: EventFd,
    connected: Mutex<Connected>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Connected {
    Yes,
    No,
}

impl MsiVector {
    pub(crate) fn new(vm: Arc<Inner>) -> Result<Self> {
        let event = event_fd()?;
        let gsi = vm.routes.lock().take()?;
        Ok(Self {
            vm,
            gsi,
            event,
            connected: Mutex::new(Connected::No),
        })
    }

    /// The eventfd: writing it raises the interrupt.
    #[must_use]
    pub fn event(&self) -> &EventFd {
        &self.event
    }

    /// Sets the message that is sent.
    ///
    /// # Errors
    /// If KVM refuses the table; the old message stays.
    pub fn route(&self, address: u64, data: u32) -> Result<()> {
        let mut table = self.vm.routes.lock();
        let message = Message { address, data };
        let old = table.messages.insert(self.gsi, message);
        if old == Some(message) {
            return Ok(());
        }
        let done = table.apply(&self.vm);
        if done.is_err() {
            match old {
                Some(old) => table.messages.insert(self.gsi, old),
                None => table.messages.remove(&self.gsi),
            };
        }
        done
    }

    /// Interrupts wait from now on.
    ///
    /// # Errors
    /// If KVM refuses.
    pub fn mask(&self) -> Result<()> {
        let mut connected = self.lock();
        if *connected == Connected::Yes {
            self.vm
                .fd
                .unregister_irqfd(&self.event, self.gsi)
                .os("KVM_IRQFD", format!("line {}", self.gsi))
                .because_of(|| step("mask an interrupt"))?;
            *connected = Connected::No;
        }
        Ok(())
    }

    /// Interrupts are sent from now on, one that waits first.
    ///
    /// # Errors
    /// If KVM refuses.
    pub fn unmask(&self) -> Result<()> {
        let mut connected = self.lock();
        if *connected == Connected::No {
            self.vm
                .fd
                .register_irqfd(&self.event, self.gsi)
                .os("KVM_IRQFD", format!("line {}", self.gsi))
                .because_of(|| step("unmask an interrupt"))?;
            *connected = Connected::Yes;
        }
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, Connected> {
        self.connected
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for MsiVector {
    fn drop(&mut self) {
        // Nobody is left to hear of a failure; the eventfd is closed next, which disconnects it
        // in any case.
        let _ = self.mask();
        self.vm.routes.lock().give_back(self.gsi);
    }
}

impl Routes {
    fn lock(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Table {
    fn take(&mut self) -> Result<u32> {
        if let Some(gsi) = self.free.pop() {
            return Ok(gsi);
        }
        if self.given == MSI_MAX {
            return Err(MsiExhausted { limit: MSI_MAX }.into());
        }
        let gsi = LEGACY_LINES + self.given;
        self.given += 1;
        Ok(gsi)
    }

    fn give_back(&mut self, gsi: u32) {
        self.messages.remove(&gsi);
        self.free.push(gsi);
    }

    fn apply(&self, vm: &Inner) -> Result<()> {
        let mut entries = legacy_entries();
        entries.extend(
            self.messages
                .iter()
                .map(|(gsi, message)| msi_entry(*gsi, *message)),
        );
        let table = KvmIrqRouting::from_entries(&entries)
            .map_err(|_| strake_observe::Observation::from(MsiExhausted { limit: MSI_MAX }))?;
        vm.fd
            .set_gsi_routing(&table)
            .os("KVM_SET_GSI_ROUTING", format!("{} entries", entries.len()))
            .because_of(|| step("route an interrupt"))
    }
}

/// What KVM itself routes after the interrupt controllers were made: each line to the I/O APIC's
/// pin of the same number, the first 16 to the 8259 pair, too.
fn legacy_entries() -> Vec<kvm_irq_routing_entry> {
    let mut entries = Vec::new();
    for line in 0..LEGACY_LINES {
        if line < PIC_LINES / 2 {
            entries.push(chip_entry(line, KVM_IRQCHIP_PIC_MASTER, line));
        } else if line < PIC_LINES {
            entries.push(chip_entry(
                line,
                KVM_IRQCHIP_PIC_SLAVE,
                line - PIC_LINES / 2,
            ));
        }
        entries.push(chip_entry(line, KVM_IRQCHIP_IOAPIC, line));
    }
    entries
}

fn chip_entry(gsi: u32, irqchip: u32, pin: u32) -> kvm_irq_routing_entry {
    kvm_irq_routing_entry {
        gsi,
        type_: KVM_IRQ_ROUTING_IRQCHIP,
        u: kvm_irq_routing_entry__bindgen_ty_1 {
            irqchip: kvm_irq_routing_irqchip { irqchip, pin },
        },
        ..Default::default()
    }
}

fn msi_entry(gsi: u32, message: Message) -> kvm_irq_routing_entry {
    let Message { address, data } = message;
    #[allow(clippy::cast_possible_truncation)] // Split into its two halves.
    let (address_lo, address_hi) = (address as u32, (address >> 32) as u32);
    kvm_irq_routing_entry {
        gsi,
        type_: KVM_IRQ_ROUTING_MSI,
        u: kvm_irq_routing_entry__bindgen_ty_1 {
            msi: kvm_irq_routing_msi {
                address_lo,
                address_hi,
                data,
                ..Default::default()
            },
        },
        ..Default::default()
    }
}
