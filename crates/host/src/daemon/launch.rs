//! What a monitor is given: the machine's description and its descriptors.
//!
//! The monitor opens nothing itself. Everything is opened here, and everything that can be wrong
//! with it is seen before a monitor exists.

use std::fs::{File, OpenOptions};
use std::os::fd::BorrowedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use strake_api::control::{
    BootConfig, DiskConfig, DiskLimits, MachineConfig, MemoryConfig, NicConfig, Request,
};
use strake_api::spec::{BootSpec, VmSpec, parse_mac};
use strake_observe::{Because, OsContext, Result};

use super::create::boot_file_refused;
use super::handover::LentFiles;
use super::{Host, private};
use crate::FileIdentity;
use crate::config::show;
use crate::inventory::{DiskRecord, NicRecord, VmRecord, Workload};
use crate::monitor::descriptors::Descriptors;
use crate::net;
use crate::observations::{InventoryCorrupt, KvmUnavailable};
use crate::storage::chain;
use crate::storage::image::Mode;
use crate::storage::store::remove_file;

/// A machine's description and the descriptors that it names.
#[derive(Debug)]
pub(super) struct Launch {
    pub(super) configure: Request,
    /// Which file each disk's image is.
    pub(super) files: Vec<(String, FileIdentity)>,
    /// A VM as profiles make it: what the machine is given.
    pub(super) spec: Option<VmSpec>,
    pub(super) fds: Descriptors,
}

impl Launch {
    pub(super) fn fds(&self) -> Vec<BorrowedFd<'_>> {
        self.fds.all()
    }
}

impl Host {
    /// Opens everything that the monitor needs for what it is to run.
    pub(super) fn prepare_launch(&self, vm: &VmRecord) -> Result<Launch> {
        match &vm.what {
            Workload::Vm(_) => {
                // From here on the VM is what profiles make of it.
                let spec = self.effective(vm, &self.place_now()?)?;
                self.prepare_machine(vm, &spec, None)
            }
            Workload::Export(spec) => self.prepare_export(vm, spec),
        }
    }

    /// The same for a monitor that takes the guest over from another one, which lent what it has.
    pub(super) fn prepare_successor(&self, vm: &VmRecord, lent: LentFiles) -> Result<Launch> {
        let spec = self.after_restart(vm, &self.place_now()?)?;
        self.prepare_machine(vm, &spec, Some(lent))
    }

    fn prepare_machine(
        &self,
        vm: &VmRecord,
        spec: &VmSpec,
        mut lent: Option<LentFiles>,
    ) -> Result<Launch> {
        let mut fds = Descriptors::default();
        let kvm = fds.add(self.open_kvm()?)?;
        let boot = match &lent {
            Some(_) => BootConfig::Predecessor,
            None => boot(&spec.boot, vm, &mut fds)?,
        };
        let mut disks = Vec::new();
        let mut files = Vec::new();
        for disk in &vm.disks {
            let named = spec.disks.iter().find(|spec| spec.name == disk.name);
            let queues = named
                .and_then(|named| named.queues)
                .unwrap_or(u16::from(spec.cpus));
            let (mut config, file) = self.disk(vm, disk, queues, lent.as_mut(), &mut fds)?;
            config.limits = super::steer::limits(spec, &disk.name);
            disks.push(config);
            files.push((disk.name.clone(), file));
        }
        let mut nics = Vec::new();
        for nic in &vm.nics {
            let mac = parse_mac(&nic.mac).map_err(|reason| InventoryCorrupt {
                record: format!("interface '{}' of VM '{}'", nic.name, vm.name),
                reason,
            })?;
            nics.push(NicConfig {
                name: nic.name.clone(),
                slot: nic.slot,
                tap: match &mut lent {
                    Some(lent) => fds.add(lent.tap(&vm.name, &nic.name)?)?,
                    None => fds.add(net::open_tap(&nic.tap, bridge(spec, nic))?)?,
                },
                mac,
            });
        }
        let observations = match &lent {
            // Until it has the guest the file of the other one counts.
            Some(_) => self.config.next_observations(&vm.name),
            None => self.config.monitor_observations(&vm.name),
        };
        let size = spec.memory.0;
        let memfd = match lent {
            Some(lent) => lent.memory,
            None => strake_memory::create_memfd(&format!("strake-ram-{}", vm.name), size)?,
        };
        let memory = MemoryConfig {
            size,
            memfd: fds.add(memfd)?,
        };
        private(&self.config.vm_state(&vm.name))?;
        let console_log = fds.add(open_console_log(&self.config.console_log(&vm.name))?)?;
        private(&self.config.vm_run(&vm.name))?;
        let observations = Some(fds.add(open_observations(&observations)?)?);
        Ok(Launch {
            configure: Request::Configure(Box::new(MachineConfig {
                vm: vm.name.clone(),
                cpus: spec.cpus,
                kvm,
                memory,
                boot,
                disks,
                nics,
                console: spec.console.unwrap_or_default(),
                console_log,
                observations,
            })),
            files,
            spec: Some(spec.clone()),
            fds,
        })
    }

    fn open_kvm(&self) -> Result<File> {
        let path = &self.config.kvm;
        let result = OpenOptions::new().read(true).write(true).open(path);
        let advice = match result.as_ref().err().map(std::io::Error::kind) {
            Some(std::io::ErrorKind::NotFound) => {
                "enable virtualisation in the firmware and load kvm_intel or kvm_amd; \
                 `strake doctor` tells more"
            }
            Some(std::io::ErrorKind::PermissionDenied) => {
                "run straked as root or in the group that owns the device"
            }
            _ => "run `strake doctor`",
        };
        result
            .os("open", path.display())
            .because_of(|| KvmUnavailable {
                path: show(path),
                advice: advice.to_owned(),
            })
    }

    pub(super) fn disk(
        &self,
        vm: &VmRecord,
        disk: &DiskRecord,
        queues: u16,
        lent: Option<&mut LentFiles>,
        fds: &mut Descriptors,
    ) -> Result<(DiskConfig, FileIdentity)> {
        let mode = Mode::of(disk.read_only);
        let (image, file) = if let Some(lent) = lent {
            lent.image(&vm.name, disk, fds)?
        } else {
            let user = |path: &Path| self.who_uses(&vm.name, path);
            let image = chain::open(&disk.image, mode, &disk.below, &user)?;
            let file = image.identity.clone();
            (image.give(fds)?, file)
        };
        let config = DiskConfig {
            name: disk.name.clone(),
            slot: disk.slot,
            image,
            read_only: disk.read_only,
            serial: disk.name.clone(),
            queues,
            limits: DiskLimits::default(),
        };
        Ok((config, file))
    }

    /// Who has locked an image, as far as the inventory can tell: another VM that is bound to the
    /// same file, under whatever name.
    pub(super) fn who_uses(&self, vm: &str, path: &Path) -> String {
        let others = self.inventory.vms().unwrap_or_default();
        others
            .iter()
            .filter(|other| other.name != vm)
            .flat_map(|other| other.disks.iter().map(move |disk| (other, disk)))
            .find(|(_, disk)| {
                let file = disk.image.file();
                file.is_ok_and(|file| crate::storage::store::same_file(file, path))
            })
            .map_or_else(
                || "another process, which has it locked".to_owned(),
                |(other, disk)| format!("disk '{}' of VM '{}'", disk.name, other.name),
            )
    }
}

/// The bridge that an interface joins.
fn bridge<'a>(spec: &'a VmSpec, nic: &NicRecord) -> Option<&'a str> {
    let named = spec.nics.iter().find(|named| named.name == nic.name)?;
    named.bridge.as_deref()
}

fn boot(boot: &BootSpec, vm: &VmRecord, fds: &mut Descriptors) -> Result<BootConfig> {
    Ok(match boot {
        BootSpec::Kernel {
            kernel,
            initrd,
            cmdline,
        } => BootConfig::Kernel {
            kernel: fds.add(open_boot_file("kernel", kernel)?)?,
            kernel_path: kernel.clone(),
            initrd: initrd
                .as_ref()
                .map(|initrd| fds.add(open_boot_file("initrd", initrd)?))
                .transpose()?,
            cmdline: cmdline.clone(),
        },
        BootSpec::Disk { disk, cmdline } => {
            let first = vm.disks.first().map(|disk| disk.name.clone());
            BootConfig::Disk {
                disk: disk.clone().or(first).unwrap_or_default(),
                cmdline_append: cmdline.clone(),
            }
        }
    })
}

/// Opens a kernel or an initial RAM disk: a regular file.
pub(super) fn open_boot_file(what: &str, path: &str) -> Result<File> {
    // Without waiting, should it be a named pipe.
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(path)
        .os("open", path)
        .because_of(|| boot_file_refused(what, path))?;
    let meta = file.metadata().os("stat", path)?;
    if !meta.is_file() {
        let error = std::io::Error::from(std::io::ErrorKind::InvalidInput);
        return Err(error)
            .os("open", format!("{path}, which is not a regular file"))
            .because_of(|| boot_file_refused(what, path));
    }
    Ok(file)
}

/// A new file: the one before may still be a monitor's that is about to end.
pub(super) fn open_observations(path: &Path) -> Result<File> {
    remove_file(path)?;
    OpenOptions::new()
        .read(true)
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)
        .os("open", path.display())
}

fn open_console_log(path: &Path) -> Result<File> {
    OpenOptions::new()
        .append(true)
        .create(true)
        .mode(0o600)
        .open(path)
        .os("open", path.display())
}
