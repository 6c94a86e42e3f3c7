//! A machine without KVM.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use strake_memory::{GuestMemory, Ram};
use strake_observe::Result;
use vm_memory::{GuestAddress, GuestAddressSpace};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::bus::MmioBus;
use crate::interrupt::{Doorbells, MsiBroker, MsiLine};
use crate::lifecycle::Component;
use crate::pci::{PciRoot, PciWindows};
use crate::virtio::{VirtioDevice, VirtioPci};

pub const ECAM: u64 = 0xe000_0000;
pub const WINDOW32: std::ops::Range<u64> = 0xc000_0000..0xe000_0000;
pub const WINDOW64: std::ops::Range<u64> = 0x40_0000_0000..0x80_0000_0000;
/// RAM: below and above the device hole, so that both are met.
pub const LOW_RAM: usize = 8 << 20;
pub const HIGH_RAM_AT: u64 = 1 << 32;
pub const HIGH_RAM: usize = 1 << 20;

/// RAM, buses, lines and doorbells.
pub struct Host {
    pub ram: Ram,
    pub mmio: MmioBus,
    pub pci: Arc<PciRoot>,
    pub msi: Arc<Lines>,
    pub bells: Arc<Bells>,
}

impl std::fmt::Debug for Host {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Host")
    }
}

impl Default for Host {
    fn default() -> Self {
        let memory = GuestMemory::from_ranges(&[
            (GuestAddress(0), LOW_RAM),
            (GuestAddress(HIGH_RAM_AT), HIGH_RAM),
        ])
        .unwrap();
        let pci = PciRoot::new(PciWindows {
            mmio32: WINDOW32,
            mmio64: WINDOW64,
        });
        let mmio = MmioBus::new();
        mmio.register(ECAM..ECAM + (1 << 20), pci.ecam()).unwrap();
        for window in [WINDOW32, WINDOW64] {
            let device = pci.window(window.start);
            mmio.register(window, device).unwrap();
        }
        Self {
            ram: Ram::new(memory),
            mmio,
            pci,
            msi: Arc::default(),
            bells: Arc::default(),
        }
    }
}

impl Host {
    pub fn memory(&self) -> Arc<GuestMemory> {
        self.ram.memory().into_inner()
    }

    /// A guest's write, as KVM would do it: a doorbell is rung without an exit.
    pub fn write(&self, address: u64, data: &[u8]) {
        if !self.bells.ring(address, data.len()) {
            self.mmio.write(address, data);
        }
    }

    pub fn read(&self, address: u64, data: &mut [u8]) {
        self.mmio.read(address, data);
    }

    /// Puts a virtio device into a slot, running; with the interrupt lines that it got.
    pub fn add<D: VirtioDevice>(&self, slot: u8, device: D) -> (Arc<VirtioPci<D>>, Vec<Arc<Line>>) {
        let had = self.msi.0.lock().unwrap().len();
        let function =
            VirtioPci::new(device, self.ram.clone(), &*self.msi, self.bells.clone()).unwrap();
        self.pci.add(slot, function.clone()).unwrap();
        function.start().unwrap();
        let lines = self
            .msi
            .0
            .lock()
            .unwrap()
            .iter()
            .skip(had)
            .cloned()
            .collect();
        (function, lines)
    }
}

/// Gives out [`Line`]s.
#[derive(Debug, Default)]
pub struct Lines(pub Mutex<Vec<Arc<Line>>>);

impl MsiBroker for Lines {
    fn allocate(&self) -> Result<Arc<dyn MsiLine>> {
        let line = Arc::new(Line {
            event: EventFd::new(EFD_NONBLOCK).unwrap(),
            routes: Mutex::default(),
        });
        self.0.lock().unwrap().push(line.clone());
        Ok(line)
    }
}

/// An interrupt line that a test looks at.
#[derive(Debug)]
pub struct Line {
    event: EventFd,
    pub routes: Mutex<Vec<(u64, u32)>>,
}

impl MsiLine for Line {
    fn event(&self) -> &EventFd {
        &self.event
    }

    fn route(&self, address: u64, data: u32) -> Result<()> {
        self.routes.lock().unwrap().push((address, data));
        Ok(())
    }

    fn mask(&self) -> Result<()> {
        Ok(())
    }

    fn unmask(&self) -> Result<()> {
        Ok(())
    }
}

impl Line {
    /// How many times it was raised since the last look.
    pub fn raised(&self) -> u64 {
        self.event.read().unwrap_or(0)
    }
}

/// Doorbells by address.
#[derive(Debug, Default)]
pub struct Bells(pub Mutex<HashMap<(u64, usize), EventFd>>);

impl Bells {
    fn ring(&self, address: u64, len: usize) -> bool {
        match self.0.lock().unwrap().get(&(address, len)) {
            Some(event) => {
                let _ = event.write(1);
                true
            }
            None => false,
        }
    }
}

impl Doorbells for Bells {
    fn attach(&self, gpa: u64, len: u8, event: &EventFd) -> Result<()> {
        let mut bells = self.0.lock().unwrap();
        let key = (gpa, usize::from(len));
        if bells.contains_key(&key) {
            // As KVM does.
            return Err(std::io::Error::from_raw_os_error(libc::EEXIST).into());
        }
        bells.insert(key, event.try_clone().unwrap());
        Ok(())
    }

    fn detach(&self, gpa: u64, len: u8, _: &EventFd) -> Result<()> {
        let removed = self.0.lock().unwrap().remove(&(gpa, usize::from(len)));
        assert!(
            removed.is_some(),
            "a doorbell was detached that is not there"
        );
        Ok(())
    }
}

/// Waits until `what` holds; panics after five seconds.
#[track_caller]
pub fn eventually(what: impl Fn() -> bool) {
    let until = Instant::now() + Duration::from_secs(5);
    while !what() {
        assert!(Instant::now() < until, "it did not happen in time");
        std::thread::sleep(Duration::from_micros(200));
    }
}
