//! The rules that values obey, whichever way they came.

use std::collections::BTreeSet;

use strake_observe::{Observation, Result};

use super::name::{ImageRef, MAX_DEVICE_NAME, MAX_NAME, MAX_PATH, check_name, parse_mac};
use super::read::{Place, Problem, Step};
use super::{BootSpec, DiskSpec, NicSpec, VmSpec};
use crate::{SpecInvalid, SpecProblems};

/// The most vCPUs.
pub const MAX_CPUS: u8 = 16;
/// The least RAM: a stock distribution kernel with its initial RAM disk does not come up in less.
pub const MIN_MEMORY: u64 = 64 << 20;
/// The most RAM: guest addresses from 256 GiB up belong to PCI devices, and RAM begins again at
/// 4 GiB after the hole of 1 GiB.
pub const MAX_MEMORY: u64 = 255 << 30;
/// RAM comes in whole huge pages.
pub const MEMORY_STEP: u64 = 2 << 20;
/// The most disks and interfaces together: one PCI slot each, less those of the machine itself.
pub const MAX_DEVICES: usize = 24;
/// The most virtqueues of a disk.
pub const MAX_QUEUES: u16 = 16;
/// The largest disk. Its migration needs 32 MiB of memory for each TiB: four bitmaps of 8 MiB.
pub const MAX_DISK: u64 = 64 << 40;
/// The lowest limit of a disk's requests per second: below, a guest takes its disk for broken.
pub const MIN_IOPS: u64 = 10;
/// The lowest limit of a disk's bytes per second, for the same reason.
pub const MIN_BANDWIDTH: u64 = 64 << 10;
/// A disk's size is a multiple of this.
pub const SECTOR: u64 = 512;
/// The longest kernel command line: what Linux takes on x86-64, less the final zero.
pub const MAX_CMDLINE: usize = 2047;
/// The most labels.
const MAX_LABELS: usize = 64;
/// The most characters of a label's value.
pub const MAX_LABEL_VALUE: usize = 253;
/// The most characters of a network device's name on Linux (IFNAMSIZ, less the final zero).
pub const MAX_IFNAME: usize = 15;

impl VmSpec {
    /// Checks what types alone do not say.
    ///
    /// # Errors
    /// [`SpecInvalid`], or [`SpecProblems`] caused by several of them.
    pub fn validate(&self) -> Result<()> {
        let mut seen: Vec<Observation> = problems(self)
            .into_iter()
            .map(|problem| {
                SpecInvalid {
                    key: problem.at.to_string(),
                    reason: problem.reason,
                    advice: problem.remedy,
                }
                .into()
            })
            .collect();
        match seen.len() {
            0 => Ok(()),
            1 => Err(seen.remove(0)),
            count => Err(Observation::from(SpecProblems {
                file: "the spec".to_owned(),
                count,
            })
            .because_all(seen)),
        }
    }
}

/// Collects problems with their places.
struct Findings(Vec<Problem>);

impl Findings {
    fn add(&mut self, at: &Place, reason: impl Into<String>, remedy: impl Into<String>) {
        self.0.push(Problem {
            at: at.clone(),
            reason: reason.into(),
            remedy: remedy.into(),
        });
    }

    fn check(&mut self, at: &Place, result: Result<(), String>, remedy: &str) {
        if let Err(reason) = result {
            self.add(at, reason, remedy);
        }
    }
}

/// Everything that is wrong with `spec`.
pub(super) fn problems(spec: &VmSpec) -> Vec<Problem> {
    let mut found = Findings(Vec::new());
    let root = Place::default();
    if spec.cpus > MAX_CPUS {
        found.add(
            &root.key("cpus"),
            format!("{} vCPUs are not possible", spec.cpus),
            format!("give it 1 to {MAX_CPUS}"),
        );
    }
    if !spec.memory.is_zero() {
        memory(&mut found, &root.key("memory"), spec.memory.0);
    }
    labels(&mut found, spec);
    boot(&mut found, spec);
    if spec.disks.len() + spec.nics.len() > MAX_DEVICES {
        found.add(
            &root.key("disk"),
            format!(
                "{} disks and {} interfaces are too many",
                spec.disks.len(),
                spec.nics.len()
            ),
            format!("a VM has at most {MAX_DEVICES} of them together"),
        );
    }
    let mut names = BTreeSet::new();
    let mut images = BTreeSet::new();
    for (index, disk) in spec.disks.iter().enumerate() {
        let at = root.key("disk").step(Step::Index(index));
        device_name(&mut found, &at, &disk.name, &mut names);
        one_disk(&mut found, &at, disk, &mut images);
    }
    let mut taps = BTreeSet::new();
    let mut macs = BTreeSet::new();
    for (index, nic) in spec.nics.iter().enumerate() {
        let at = root.key("nic").step(Step::Index(index));
        device_name(&mut found, &at, &nic.name, &mut names);
        one_nic(&mut found, &at, nic, &mut taps, &mut macs);
    }
    found.0
}

fn memory(found: &mut Findings, at: &Place, memory: u64) {
    if memory < MIN_MEMORY {
        found.add(
            at,
            "a VM needs at least 64M",
            "write memory = \"64M\" or more",
        );
    } else if memory > MAX_MEMORY {
        found.add(
            at,
            "a VM has at most 255G",
            "write memory = \"255G\" or less",
        );
    } else if !memory.is_multiple_of(MEMORY_STEP) {
        found.add(
            at,
            "memory comes in whole huge pages",
            "write a multiple of 2M",
        );
    }
}

fn labels(found: &mut Findings, spec: &VmSpec) {
    let root = Place::default().key("labels");
    if spec.labels.len() > MAX_LABELS {
        found.add(
            &root,
            format!("{} labels are too many", spec.labels.len()),
            format!("give it at most {MAX_LABELS}"),
        );
    }
    for (label, value) in &spec.labels {
        let at = root.key(label);
        found.check(
            &at,
            check_name(label, MAX_NAME),
            "choose a label such as 'team' or 'env.stage'",
        );
        if value.len() > MAX_LABEL_VALUE || value.chars().any(char::is_control) {
            found.add(
                &at,
                "a label's value is one line",
                format!("write at most {MAX_LABEL_VALUE} bytes without control characters"),
            );
        }
    }
}

fn boot(found: &mut Findings, spec: &VmSpec) {
    let at = Place::default().key("boot");
    let cmdline = match &spec.boot {
        BootSpec::Kernel {
            kernel,
            initrd,
            cmdline,
        } => {
            host_file(found, &at.key("kernel"), kernel);
            if let Some(initrd) = initrd {
                host_file(found, &at.key("initrd"), initrd);
            }
            cmdline
        }
        BootSpec::Disk { disk, cmdline } => {
            match disk {
                Some(name) if !spec.disks.iter().any(|disk| disk.name == *name) => found.add(
                    &at.key("disk"),
                    format!("the VM has no disk '{name}'"),
                    "name one of its disks, or leave the key out to boot from the first",
                ),
                None if spec.disks.is_empty() => found.add(
                    &at.key("from"),
                    "the VM has no disk to boot from",
                    "add a [[disk]] or boot from a kernel",
                ),
                _ => {}
            }
            cmdline
        }
    };
    if cmdline.len() > MAX_CMDLINE {
        found.add(
            &at.key("cmdline"),
            format!("{} bytes are too long", cmdline.len()),
            format!("shorten it to at most {MAX_CMDLINE} bytes"),
        );
    }
    if cmdline.chars().any(char::is_control) {
        found.add(
            &at.key("cmdline"),
            "it has a control character",
            "write it as one line",
        );
    }
}

fn host_file(found: &mut Findings, at: &Place, path: &str) {
    if !path.starts_with('/') || path.len() > MAX_PATH || path.chars().any(char::is_control) {
        found.add(
            at,
            format!("'{}' is not an absolute path", path.escape_debug()),
            "write the path from the root, for example /boot/vmlinuz",
        );
    }
}

fn device_name<'a>(found: &mut Findings, at: &Place, name: &'a str, names: &mut BTreeSet<&'a str>) {
    let at = at.key("name");
    found.check(
        &at,
        check_name(name, MAX_DEVICE_NAME),
        "choose a name such as 'root' or 'net0'",
    );
    if !names.insert(name) {
        found.add(
            &at,
            format!("there is another '{name}'"),
            "give each its own name",
        );
    }
}

fn one_disk<'a>(
    found: &mut Findings,
    at: &Place,
    disk: &'a DiskSpec,
    images: &mut BTreeSet<&'a str>,
) {
    found.check(
        &at.key("image"),
        ImageRef::parse(&disk.image).map(drop),
        "write DATASTORE:FILE, for example fast:web1.raw, or an absolute path",
    );
    if !images.insert(&disk.image) {
        found.add(
            &at.key("image"),
            format!("another disk has the image '{}' too", disk.image),
            "give each disk its own image",
        );
    }
    if let Some(size) = disk.size {
        let at = at.key("size");
        if size.0 == 0 || !size.0.is_multiple_of(SECTOR) {
            found.add(
                &at,
                "a disk is a whole number of sectors",
                "write a multiple of 512 bytes, for example \"10G\"",
            );
        } else if size.0 > MAX_DISK {
            found.add(
                &at,
                "a disk has at most 64T",
                "write size = \"64T\" or less",
            );
        } else if disk.read_only {
            found.add(
                &at,
                "an empty disk that the guest may not write is of no use",
                "leave out `size`, or `read-only`",
            );
        }
    }
    if disk.queues.is_some_and(|n| n == 0 || n > MAX_QUEUES) {
        found.add(
            &at.key("queues"),
            "a disk has 1 to 16 queues",
            "leave it out for one queue for each vCPU",
        );
    }
    if disk
        .iops
        .is_some_and(|n| !(MIN_IOPS..=1 << 32).contains(&n))
    {
        found.add(
            &at.key("iops"),
            "a disk's limit is 10 to 4294967296 requests per second",
            "leave it out for no limit",
        );
    }
    if disk
        .bandwidth
        .is_some_and(|rate| !(MIN_BANDWIDTH..=1 << 48).contains(&rate.0))
    {
        found.add(
            &at.key("bandwidth"),
            "a disk's limit is 64K to 256T per second",
            "leave it out for no limit",
        );
    }
}

fn one_nic<'a>(
    found: &mut Findings,
    at: &Place,
    nic: &'a NicSpec,
    taps: &mut BTreeSet<&'a str>,
    macs: &mut BTreeSet<[u8; 6]>,
) {
    if let Some(tap) = &nic.tap {
        found.check(
            &at.key("tap"),
            check_interface(tap),
            "choose a name such as 'tap-web1'",
        );
        if !taps.insert(tap) {
            found.add(
                &at.key("tap"),
                format!("another interface has the tap '{tap}' too"),
                "give each interface its own tap",
            );
        }
    }
    if let Some(bridge) = &nic.bridge {
        found.check(
            &at.key("bridge"),
            check_interface(bridge),
            "name a bridge of the host, for example 'br0'",
        );
    }
    if let Some(mac) = &nic.mac {
        match parse_mac(mac) {
            Err(reason) => found.add(
                &at.key("mac"),
                reason,
                "leave it out to have one made, or write six pairs of hexadecimal digits",
            ),
            Ok(mac) if !macs.insert(mac) => found.add(
                &at.key("mac"),
                "another interface has this address too",
                "leave it out to have one made",
            ),
            Ok(_) => {}
        }
    }
}

/// What Linux takes as the name of a network device, less what only confuses.
fn check_interface(name: &str) -> Result<(), String> {
    check_name(name, MAX_IFNAME).map_err(|reason| format!("'{}': {reason}", name.escape_debug()))
}
