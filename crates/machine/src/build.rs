//! From a configuration and descriptors to a machine.
//!
//! In the order in which things depend on each other: the VM with its memory, the vCPUs, the
//! platform, the disks and network interfaces in their slots, the kernel in memory, the vCPUs'
//! threads. Whatever fails, what was built before is dropped and the monitor is as before.

use std::collections::HashSet;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use strake_api::control::{BootConfig, ConsoleKind, DiskConfig, MachineConfig};
use strake_arch::acpi::{self, AcpiConfig};
use strake_arch::boot::{self, Entry};
use strake_arch::{cpuid, layout, msr};
use strake_block::{Access, LiveDisk};
use strake_devices::interrupt::{Doorbells, MsiBroker};
use strake_devices::lifecycle::Component;
use strake_devices::pci::{PciFunction, SLOTS};
use strake_devices::virtio::blk::{BlkConfig, VirtioBlk};
use strake_devices::virtio::console::VirtioConsole;
use strake_devices::virtio::net::VirtioNet;
use strake_devices::virtio::rng::VirtioRng;
use strake_devices::virtio::{VirtioDevice, VirtioPci};
use strake_kvm::{Kvm, Vcpu, Vm};
use strake_memory::{GuestRam, Ram};
use strake_observe::{Because, Observation, OsContext, Result};

use crate::adapters::KvmPlatform;
use crate::boot_disk;
use crate::images;
use crate::jobs::Jobs;
use crate::machine::{Guest, Place, Run};
use crate::observations::{BadConfig, BuildFailed, NoSuchDisk};
use crate::platform::Platform;
use crate::vcpus::{Crew, Vcpus};
use crate::{Descriptors, Machine, Mailbox};

/// The most queues of a disk.
const QUEUES_MAX: u16 = 16;

/// The longest serial number of a virtio disk.
const SERIAL_MAX: usize = 20;

impl Machine {
    /// Builds the machine that `config` describes out of the descriptors that came with it. Its
    /// guest does not run yet.
    ///
    /// # Errors
    /// [`BadConfig`] if it describes none, [`BuildFailed`] with the step that failed.
    pub fn build(
        config: MachineConfig,
        fds: &mut Descriptors,
        mailbox: &Arc<Mailbox>,
    ) -> Result<Arc<Self>> {
        check(&config)?;
        let failed = |step: &str| BuildFailed {
            vm: config.vm.clone(),
            step: step.to_owned(),
        };
        // First, so that what goes wrong below is in it.
        if let Some(file) = config.observations {
            let file = fds.take(file, "the file for observations");
            let file = file.because_of(|| failed("keeping observations"))?;
            strake_observe::recorder().outlive(strake_observe::Ring::new(File::from(file)));
        }

        let kvm = fds.take(config.kvm, "/dev/kvm").and_then(Kvm::from_fd);
        let kvm = kvm.because_of(|| failed("opening KVM"))?;
        let ram = fds
            .take(config.memory.memfd, "the guest's memory")
            .and_then(|memfd| GuestRam::map(memfd, config.memory.size))
            .because_of(|| failed("mapping the guest's memory"))?;
        let vm = Vm::new(&kvm, &ram).because_of(|| failed("creating the VM"))?;

        let vcpus =
            create_vcpus(&kvm, &vm, config.cpus).because_of(|| failed("creating the vCPUs"))?;
        let crew = Crew::new(&vcpus);
        let platform = fds
            .take(config.console_log, "the console's log")
            .and_then(|log| Platform::build(&vm, &crew, File::from(log), mailbox))
            .because_of(|| failed("building the platform"))?;

        let mut slots = Slots {
            platform,
            kvm: Arc::new(KvmPlatform(vm.clone())),
            ram: ram.ram(),
        };
        let disks = add_disks(&mut slots, &config, fds, mailbox)
            .because_of(|| failed("adding the disks"))?;
        let taps = add_nics(&mut slots, &config, fds)
            .because_of(|| failed("adding the network interfaces"))?;
        add_own(&mut slots, &config).because_of(|| failed("adding the machine's own devices"))?;

        let entry = load(&config, fds, &disks, &ram)
            .because_of(|| failed(&format!("loading {}", kernel_of(&config.boot))))?;
        if let Some(first) = vcpus.first() {
            if let Some(entry) = &entry {
                set_entry(first, entry).because_of(|| failed("setting the entry point"))?;
            }
            first.prepare_save();
        }
        let run = Run {
            place: match entry {
                Some(_) => Place::Here,
                None => Place::Awaited,
            },
            ..Run::default()
        };
        let Platform {
            buses,
            console,
            power,
            components,
            ..
        } = slots.platform;
        let vcpus = Vcpus::start(vcpus, &crew, &buses, mailbox)
            .because_of(|| failed("starting the vCPUs' threads"))?;
        Ok(Arc::new(Self {
            name: config.vm,
            run: std::sync::Mutex::new(run),
            vcpus,
            components,
            disks,
            jobs: Jobs::default(),
            mailbox: Arc::clone(mailbox),
            guest: Some(Guest {
                console,
                power,
                taps,
                ram,
                vm,
            }),
        }))
    }
}

/// What a function needs to be put into its slot.
struct Slots {
    platform: Platform,
    kvm: Arc<KvmPlatform>,
    ram: Ram,
}

impl Slots {
    fn add<D: VirtioDevice>(&mut self, slot: u8, device: D) -> Result<()> {
        let msi: &dyn MsiBroker = &*self.kvm;
        let doorbells: Arc<dyn Doorbells> = self.kvm.clone();
        let function = VirtioPci::new(device, self.ram.clone(), msi, doorbells)?;
        let pci: Arc<dyn PciFunction> = function.clone();
        self.platform.pci.add(slot, pci)?;
        let component: Arc<dyn Component> = function;
        self.platform.components.push(component);
        Ok(())
    }
}

fn check(config: &MachineConfig) -> Result<()> {
    let bad = |reason: String| -> Result<()> {
        Err(BadConfig {
            vm: config.vm.clone(),
            reason,
        }
        .into())
    };
    if config.vm.is_empty() {
        return bad("the VM has no name".to_owned());
    }
    if config.cpus == 0 || config.cpus > layout::MAX_CPUS {
        return bad(format!(
            "{} vCPUs; there are 1 to {}",
            config.cpus,
            layout::MAX_CPUS
        ));
    }
    let mut names = HashSet::new();
    let mut slots = HashSet::new();
    let disks = config.disks.iter().map(|disk| (&disk.name, disk.slot));
    let nics = config.nics.iter().map(|nic| (&nic.name, nic.slot));
    for (name, slot) in disks.chain(nics) {
        if name.is_empty() || !names.insert(name) {
            return bad(format!("the device name '{name}' is empty or used twice"));
        }
        if !(1..SLOTS).contains(&slot) || !slots.insert(slot) {
            return bad(format!(
                "PCI slot {slot} of '{name}' does not exist or is used twice"
            ));
        }
    }
    config
        .disks
        .iter()
        .try_for_each(|disk| check_disk(&config.vm, disk))
}

/// What a disk must be, whoever uses it.
pub(crate) fn check_disk(vm: &str, disk: &DiskConfig) -> Result<()> {
    let reason = if disk.queues == 0 || disk.queues > QUEUES_MAX {
        format!(
            "disk '{}' has {} queues; there are 1 to {QUEUES_MAX}",
            disk.name, disk.queues
        )
    } else if disk.serial.len() > SERIAL_MAX {
        format!(
            "the serial number of disk '{}' exceeds {SERIAL_MAX} bytes",
            disk.name
        )
    } else {
        return Ok(());
    };
    Err(BadConfig {
        vm: vm.to_owned(),
        reason,
    }
    .into())
}

fn create_vcpus(kvm: &Kvm, vm: &Vm, count: u8) -> Result<Vec<Vcpu>> {
    let supported = kvm.supported_cpuid()?;
    (0..count)
        .map(|index| {
            let mut vcpu = vm.create_vcpu(index)?;
            vcpu.set_cpuid(&cpuid::guest_cpuid(&supported, index, count))?;
            let registers = msr::boot_msrs();
            vcpu.set_msrs(registers.into_iter().map(|msr| (msr.index, msr.value)))?;
            vcpu.set_reset_state()?;
            Ok(vcpu)
        })
        .collect()
}

/// The first vCPU begins at the kernel's entry; the others wait for it.
fn set_entry(first: &Vcpu, entry: &Entry) -> Result<()> {
    let (regs, sregs) = boot::registers(entry, first.sregs()?);
    first.set_sregs(&sregs)?;
    first.set_regs(&regs)
}

fn add_disks(
    slots: &mut Slots,
    config: &MachineConfig,
    fds: &mut Descriptors,
    mailbox: &Arc<Mailbox>,
) -> Result<Vec<Arc<LiveDisk>>> {
    let mut disks = Vec::new();
    for disk in &config.disks {
        let live = open_disk(disk, fds, mailbox)?;
        slots.add(disk.slot, blk(disk, &live)?)?;
        disks.push(live);
    }
    Ok(disks)
}

/// The disk over its image.
pub(crate) fn open_disk(
    disk: &DiskConfig,
    fds: &mut Descriptors,
    mailbox: &Arc<Mailbox>,
) -> Result<Arc<LiveDisk>> {
    let access = if disk.read_only {
        Access::ReadOnly
    } else {
        Access::ReadWrite
    };
    let purpose = format!("the image of disk '{}'", disk.name);
    let image = images::open(&disk.image, access, &purpose, fds)?;
    let live = LiveDisk::new(disk.name.clone(), image);
    let observer = Arc::clone(mailbox);
    live.set_observer(Arc::new(move |seen| observer.observe(seen)));
    live.set_limits(disk.limits)?;
    Ok(live)
}

/// The device that a guest sees of it.
pub(crate) fn blk(disk: &DiskConfig, live: &Arc<LiveDisk>) -> Result<VirtioBlk> {
    VirtioBlk::new(
        format!("blk-{}", disk.name),
        Arc::clone(live),
        &BlkConfig {
            queues: disk.queues,
            serial: disk.serial.clone(),
            read_only: disk.read_only,
        },
    )
}

fn add_nics(
    slots: &mut Slots,
    config: &MachineConfig,
    fds: &mut Descriptors,
) -> Result<Vec<(String, OwnedFd)>> {
    let mut taps = Vec::new();
    for nic in &config.nics {
        let tap = fds.take(nic.tap, &format!("the tap of interface '{}'", nic.name))?;
        let lent = tap.try_clone().os("dup", &nic.name)?;
        taps.push((nic.name.clone(), lent));
        let device = VirtioNet::new(format!("net-{}", nic.name), tap, nic.mac)?;
        slots.add(nic.slot, device)?;
    }
    Ok(taps)
}

/// What every guest has beside its spec's devices: a source of random numbers in the highest slot
/// that the spec leaves free, and a virtio console in the next one below. The spec's own slots are
/// recorded and do not move, so these do not either: the daemon gives out slots below 28 only, which
/// makes them slots 31 and 30.
fn add_own(slots: &mut Slots, config: &MachineConfig) -> Result<()> {
    let mut free = free_slots(config);
    // A guest with 31 devices of its own does without.
    if let Some(slot) = free.next() {
        slots.add(slot, VirtioRng::new("rng"))?;
    }
    let console = VirtioConsole::new("hvc", slots.platform.console.clone())?;
    if config.console == ConsoleKind::Virtio {
        slots.platform.console.connect_input(console.input());
    }
    match (free.next(), config.console) {
        (Some(slot), _) => slots.add(slot, console),
        (None, ConsoleKind::Serial) => Ok(()),
        (None, ConsoleKind::Virtio) => Err(BadConfig {
            vm: config.vm.clone(),
            reason: "no PCI slot is left for the virtio console".to_owned(),
        }
        .into()),
    }
}

/// The slots that the spec leaves free, from the highest.
fn free_slots(config: &MachineConfig) -> impl Iterator<Item = u8> {
    let disks = config.disks.iter().map(|disk| disk.slot);
    let taken: HashSet<u8> = disks
        .chain(config.nics.iter().map(|nic| nic.slot))
        .collect();
    (1..SLOTS).rev().filter(move |slot| !taken.contains(slot))
}

/// The kernel, as its user knows it.
fn kernel_of(boot: &BootConfig) -> String {
    match boot {
        BootConfig::Kernel { kernel_path, .. } => format!("the kernel {kernel_path}"),
        BootConfig::Disk { disk, .. } => format!("the kernel on disk '{disk}'"),
        BootConfig::Predecessor => "nothing".to_owned(),
    }
}

/// Puts the kernel into the guest's memory; none if the guest has booted already.
fn load(
    config: &MachineConfig,
    fds: &mut Descriptors,
    disks: &[Arc<LiveDisk>],
    ram: &GuestRam,
) -> Result<Option<Entry>> {
    use vm_memory::GuestAddressSpace;
    if config.boot == BootConfig::Predecessor {
        return Ok(None);
    }
    let tables = acpi::build(&AcpiConfig { cpus: config.cpus })?;
    let memory = ram.ram().memory();
    let entry = match &config.boot {
        BootConfig::Kernel {
            kernel,
            initrd,
            cmdline,
            ..
        } => {
            let mut kernel = File::from(fds.take(*kernel, "the kernel")?);
            let initrd = initrd
                .map(|initrd| fds.take(initrd, "the initial RAM disk"))
                .transpose()?;
            let mut initrd = initrd.map(File::from);
            let initrd = initrd.as_mut().map(|file| file as &mut dyn boot::BootFile);
            boot::load(&memory, &mut kernel, initrd, cmdline, &tables, ram.size())
        }
        BootConfig::Disk {
            disk,
            cmdline_append,
        } => {
            let live = disks
                .iter()
                .find(|live| live.name() == disk)
                .ok_or_else(|| Observation::from(NoSuchDisk { disk: disk.clone() }))?;
            boot_disk::load(live, cmdline_append, &memory, &tables, ram.size())
        }
        BootConfig::Predecessor => return Ok(None),
    };
    entry.map(Some)
}
