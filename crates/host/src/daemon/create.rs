//! Creation and removal of VMs.
//!
//! Creation decides everything first (where each image is, whether it may be used, which slots,
//! taps and addresses the devices get), then creates the missing images, then writes one
//! transaction. What was created goes again if a later step fails.

use std::io::Read;
use std::path::{Path, PathBuf};

use strake_api::rest::{CreateVm, Vm, VmState};
use strake_api::spec::{
    BootSpec, DiskSpec, ImageRef, MAX_NAME, NicSpec, VmSpec, check_name, parse_mac,
};
use strake_observe::{Because, Observation, OsContext, Result};

use super::commit::is_a_jobs;
use super::live::state_name;
use super::{Host, guard, task};
use crate::Binding;
use crate::config::show;
use crate::inventory::{DiskRecord, NicRecord};
use crate::observations::{
    BadName, BootFileRefused, CreateFailed, ImageInUse, ImageRefused, NotRemoved, RemoveFailed,
    RequestRefused, VmExists, WrongState,
};
use crate::storage::chain;
use crate::storage::image::{self, Created};
use crate::storage::store;

/// The first PCI slot of disks and interfaces; those below, and those from 28 up, belong to the
/// machine itself. Slots are recorded with the VM and never change by accident.
const FIRST_SLOT: u8 = 4;

/// Whether a VM's images go with it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Images {
    /// They stay.
    Keep,
    /// Those that Strake created or that lie in a datastore go, unless another VM has them or the
    /// VM only read them.
    Delete,
}

/// A disk whose place was decided.
pub(super) struct Placed {
    pub(super) record: DiskRecord,
    missing: bool,
}

impl Host {
    /// Adds a VM, with images of their `size` where there are none.
    ///
    /// # Errors
    /// [`CreateFailed`], with the reason; nothing is left behind then.
    pub fn create(&self, request: &CreateVm) -> Result<Vm> {
        let name = &request.name;
        check_name(name, MAX_NAME).map_err(|reason| BadName {
            what: "VM".to_owned(),
            name: name.clone(),
            reason,
        })?;
        let failed = || CreateFailed { vm: name.clone() };
        task(format!("create VM '{name}'"), failed, |_| {
            request.spec.validate()?;
            let _placing = guard(&self.placing);
            if self.inventory.vms()?.iter().any(|vm| vm.name == *name) {
                return Err(VmExists { vm: name.clone() }.into());
            }
            let _steering = guard(&self.steering);
            self.create_placed(name, &request.spec)
        })?;
        self.vm(name)
    }

    fn create_placed(&self, name: &str, spec: &VmSpec) -> Result<()> {
        check_boot_files(&spec.boot)?;
        let mut placed: Vec<Placed> = Vec::new();
        for (disk, slot) in spec.disks.iter().zip(FIRST_SLOT..) {
            let next = self.place(disk, slot)?;
            if placed
                .iter()
                .any(|other| other.record.image.location == next.record.image.location)
            {
                let path = next.record.image.file()?;
                return Err(in_use(path, "another disk of the same VM"));
            }
            placed.push(next);
        }
        let disks_count = u8::try_from(spec.disks.len()).unwrap_or(u8::MAX);
        let first_nic = FIRST_SLOT.saturating_add(disks_count);
        let nics = spec
            .nics
            .iter()
            .zip(first_nic..)
            .enumerate()
            .map(|(index, (nic, slot))| nic_record(name, nic, index, slot))
            .collect::<Result<Vec<_>>>()?;
        let stores = placed.iter().map(|disk| {
            let DiskRecord {
                name, datastore, ..
            } = &disk.record;
            (name.clone(), datastore.clone())
        });
        self.effective_of_new(name, spec, &stores.collect())?
            .validate()?;
        let mut created = Vec::new();
        for disk in placed.iter_mut().filter(|disk| disk.missing) {
            let image = &disk.record.image;
            let made = image::create(image, disk.record.size)?;
            created.push(Created::new(image.file()?, &made.identity));
            disk.record.file = Some(made.identity);
        }
        let disks: Vec<DiskRecord> = placed.into_iter().map(|disk| disk.record).collect();
        self.inventory.add_vm(name, spec, &disks, &nics)?;
        created.into_iter().for_each(Created::keep);
        Ok(())
    }

    /// Decides where a disk is and whether the VM may have it.
    pub(super) fn place(&self, disk: &DiskSpec, slot: u8) -> Result<Placed> {
        let (path, datastore) = self.resolve(&disk.image)?;
        let image = Binding::new(path.clone(), disk.format());
        let looks = chain::look(&image, &self.allowed_below()?)?;
        let size = match (&looks, disk.size) {
            (Some(looks), Some(size)) if looks.size != size.0 => {
                return Err(refused(
                    &path,
                    &format!("it has {} bytes, the spec says {}", looks.size, size.0),
                    "leave out `size` to use the image as it is, or name another image",
                ));
            }
            (Some(looks), _) => looks.size,
            (None, Some(size)) => size.0,
            (None, None) => {
                return Err(refused(
                    &path,
                    "there is no such file",
                    "add `size` to have an empty image created, or name an existing one",
                ));
            }
        };
        image::check_size(&path, size)?;
        let alone = [path.clone()];
        let files = looks.as_ref().map_or(&alone[..], |looks| &looks.files);
        self.refuse_shared(files, disk.read_only)?;
        let unfinished = self.inventory.unfinished_jobs()?;
        let mut jobs = unfinished.iter();
        if let Some(job) = jobs.find(|job| job.destination.location == image.location) {
            return Err(in_use(&path, &format!("job {}", job.id)));
        }
        Ok(Placed {
            missing: looks.is_none(),
            record: DiskRecord {
                name: disk.name.clone(),
                slot,
                image,
                datastore,
                size,
                read_only: disk.read_only,
                created: looks.is_none(),
                file: None,
                below: files.get(1..).unwrap_or_default().to_vec(),
                parent: None,
                layers: Vec::new(),
            },
        })
    }

    /// The path of an image and its datastore, if it lies in one.
    fn resolve(&self, image: &str) -> Result<(PathBuf, Option<String>)> {
        let reference = ImageRef::parse(image).map_err(|reason| ImageRefused {
            path: image.to_owned(),
            reason,
            advice: "write DATASTORE:FILE or an absolute path".to_owned(),
        })?;
        let path = match reference {
            ImageRef::InStore { store, file } => {
                let store = self.inventory.datastore(&store)?;
                store::room(&store.name, &store.path)?;
                image::canonical(&store.path.join(file))?
            }
            ImageRef::Path(path) => image::canonical(&path)?,
        };
        if path.to_str().is_none() {
            return Err(refused(
                &path,
                "its path is not UTF-8",
                "rename it or its directory",
            ));
        }
        if is_a_jobs(&path) {
            return Err(refused(
                &path,
                "such names are kept for the files of migrations, which are removed with them",
                "give the image another name",
            ));
        }
        let directory = path.parent();
        let datastore = self
            .inventory
            .datastores()?
            .into_iter()
            .find(|store| Some(store.path.as_path()) == directory)
            .map(|store| store.name);
        Ok((path, datastore))
    }

    /// Removes a VM that does not run.
    ///
    /// # Errors
    /// [`RemoveFailed`], with the reason.
    pub fn remove(&self, name: &str, images: Images) -> Result<()> {
        let cell = self.cell(name)?;
        let failed = || RemoveFailed {
            vm: name.to_owned(),
        };
        task(format!("remove VM '{name}'"), failed, |_| {
            let _operation = guard(&cell.operation);
            let state = cell.live().state;
            if !matches!(state, VmState::Stopped | VmState::Failed) {
                return Err(WrongState {
                    vm: name.to_owned(),
                    state: state_name(state).to_owned(),
                    needed: "stopped".to_owned(),
                    advice: format!("stop it first with `strake stop {name}`"),
                }
                .into());
            }
            let record = self.inventory.vm(name)?;
            record.spec()?;
            self.refuse_living_monitor(&cell, &record)?;
            self.refuse_exported(name)?;
            self.end_all_interrupted(&cell)?;
            let _placing = guard(&self.placing);
            self.inventory.remove_vm(name)?;
            self.forget_cell(name);
            let mut left = Vec::new();
            if images == Images::Delete {
                left.extend(self.remove_images(&record.disks));
            }
            for directory in [self.config.vm_state(name), self.config.vm_run(name)] {
                left.extend(remove_directory(&directory));
            }
            match left.into_iter().next() {
                Some(seen) => Err(seen),
                None => Ok(()),
            }
        })
    }

    fn remove_images(&self, disks: &[DiskRecord]) -> Vec<Observation> {
        let ours = |disk: &&DiskRecord| {
            let shared = self.inventory.users_of_image(&disk.image.location);
            !disk.read_only
                && (disk.created || disk.datastore.is_some())
                && shared.is_ok_and(|users| users.is_empty())
        };
        let images = disks.iter().filter(ours).flat_map(|disk| {
            let layers = disk.layers.iter().rev();
            let layers = layers.filter(|layer| layer.created || layer.datastore.is_some());
            let layers = layers.map(|layer| (&layer.image, layer.file.as_ref()));
            [(&disk.image, disk.file.as_ref())]
                .into_iter()
                .chain(layers)
        });
        images
            .filter_map(|(image, file)| {
                let what = "the image of a removed VM";
                match self.is_below_others(image) {
                    Ok(true) => None,
                    Ok(false) => image::remove(image.file().ok()?, file, what).err(),
                    Err(seen) => Some(seen),
                }
            })
            .collect()
    }
}

pub(super) fn remove_directory(directory: &Path) -> Option<Observation> {
    match std::fs::remove_dir_all(directory) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err::<(), _>(error)
            .os("rmdir", directory.display())
            .because_of(|| NotRemoved {
                path: show(directory),
                what: "files of a removed VM".to_owned(),
            })
            .err(),
        _ => None,
    }
}

/// A spec whose kernel is not there is refused now rather than at the first start.
pub(super) fn check_boot_files(boot: &BootSpec) -> Result<()> {
    let BootSpec::Kernel { kernel, initrd, .. } = boot else {
        return Ok(());
    };
    let files = [("kernel", Some(kernel)), ("initrd", initrd.as_ref())];
    for (what, path) in files {
        let Some(path) = path else { continue };
        super::launch::open_boot_file(what, path)?;
    }
    Ok(())
}

pub(super) fn boot_file_refused(what: &str, path: &str) -> BootFileRefused {
    BootFileRefused {
        what: what.to_owned(),
        path: path.to_owned(),
    }
}

fn nic_record(vm: &str, nic: &NicSpec, index: usize, slot: u8) -> Result<NicRecord> {
    let mac = match &nic.mac {
        Some(mac) => parse_mac(mac).map_err(|reason| RequestRefused {
            reason,
            advice: "correct the MAC address in the spec".to_owned(),
        })?,
        None => made_up_mac()?,
    };
    Ok(NicRecord {
        name: nic.name.clone(),
        slot,
        tap: nic.tap.clone().unwrap_or_else(|| tap_name(vm, index)),
        bridge: nic.bridge.clone(),
        mac: mac.map(|byte| format!("{byte:02x}")).join(":"),
    })
}

/// A locally administered address, with the prefix that KVM guests are known by.
fn made_up_mac() -> Result<[u8; 6]> {
    let mut random = [0; 3];
    std::fs::File::open("/dev/urandom")
        .and_then(|mut source| source.read_exact(&mut random))
        .os("read", "/dev/urandom")?;
    let [a, b, c] = random;
    Ok([0x52, 0x54, 0x00, a, b, c])
}

/// The name of a tap that the spec does not name: the VM's name if that fits into the 15 bytes
/// that Linux allows, else a digest of it.
fn tap_name(vm: &str, index: usize) -> String {
    let plain = format!("strake-{vm}-{index}");
    if plain.len() <= 15 {
        return plain;
    }
    // FNV-1a: stable for ever, which the standard hasher is not.
    let digest = vm.bytes().fold(0x811c_9dc5_u32, |hash, byte| {
        (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193)
    });
    format!("strk{digest:08x}-{index}")
}

pub(super) fn in_use(path: &Path, user: &str) -> Observation {
    ImageInUse {
        path: show(path),
        user: user.to_owned(),
    }
    .into()
}

fn refused(path: &Path, reason: &str, advice: &str) -> Observation {
    ImageRefused {
        path: show(path),
        reason: reason.to_owned(),
        advice: advice.to_owned(),
    }
    .into()
}

#[cfg(test)]
mod tests {
    use super::tap_name;

    #[test]
    fn tap_names_fit_and_differ() {
        assert_eq!(tap_name("web1", 0), "strake-web1-0");
        let long = tap_name("a-very-long-machine-name", 23);
        assert_eq!(long.len(), 15);
        assert_ne!(long, tap_name("a-very-long-machine-nama", 23));
    }
}
